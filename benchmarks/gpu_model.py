"""A training step of ResNet-50 on a GPU: eager, compiled, and as a CUDA graph.

Ours against ``nn.SyncBatchNorm`` and local BatchNorm, in bfloat16 autocast and channels-last. The
process is one of two ranks of a group that answers without communicating, so that both
synchronised models do all of their work but for the collectives themselves. Beside each difference
stands the prediction: the bytes that our kernels move less, over the bandwidth of a large copy.

Bar: faster than ``nn.SyncBatchNorm`` in each of the three forms.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from gpu_measure import copy_bandwidth, gpu, require_gpu, timed
from measure import arguments, finish
from models import torchvision_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import bnrewrite

MODELS = ("ours", "ours without fusion", "nn.SyncBatchNorm", "local")


def models() -> dict[str, nn.Module]:
    """The same network with each kind of BatchNorm."""
    torch.manual_seed(0)
    plain = torchvision_model("resnet50").cuda()
    plain = plain.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    others = ("inline_children", "share_collectives", "overlap_collectives")
    made = [
        bnrewrite.convert(copy.deepcopy(plain)),
        bnrewrite.convert(copy.deepcopy(plain), passes=others),
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)),
        plain,
    ]
    return dict(zip(MODELS, made, strict=True))


def step_of(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], object]:
    """Forward, backward and an SGD step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def graphed(step: Callable[[], object]) -> Callable[[], object]:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def attempt(make: Callable[[], Callable[[], object]], repeats: int) -> float | str:
    """Milliseconds of a step, or why there are none: nn.SyncBatchNorm does not compile whole."""
    try:
        return timed(make(), repeats=repeats)
    except Exception as error:
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def saved_bytes(x: Tensor) -> int:
    """Bytes, in bfloat16, that fusion neither reads nor writes in a step of ResNet-50.

    A separate ReLU reads and writes the result, and its backward two tensors and a third; a sum
    adds three passes to that, and ours one pass forward and two backward: five each. Where the
    other operand of the sum is a BatchNorm, too, the forward leaves out the write and the read of
    its result, and the backward a write and a read of the gradient, and the sum's result in both
    phases, since it computes again what was activated: six more.
    """
    sizes: list[int] = []

    def noting(passes: int) -> Callable[[nn.Module, Any], None]:
        return lambda _, args: sizes.append(passes * 2 * args[0].numel())

    plain = torchvision_model("resnet50").cuda()
    for name, module in plain.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(noting(6 if "downsample" in name else 5))
    with torch.no_grad():
        plain(x)
    return sum(sizes)


def main() -> None:
    options = arguments(__doc__, rounds=20)
    require_gpu()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth: {bandwidth / 1e9:.2f} TB/s; times in ms per step")
    rows = []
    for batch in (8, 32, 128):
        x = torch.randn(batch, 3, 224, 224, device="cuda")
        x = x.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(1000, (batch,), device="cuda")
        predicted = saved_bytes(x) / bandwidth
        row: dict[str, Any] = {"batch": batch, "predicted_gain_ms": predicted, "ms": {}}
        for name, model in models().items():
            step = step_of(model, x, labels)
            compiled = step_of(torch.compile(copy.deepcopy(model)), x, labels)  # pyright: ignore
            row["ms"][name] = {
                "eager": attempt(lambda step=step: step, options.rounds),
                "graph": attempt(lambda step=step: graphed(step), options.rounds),
                "compiled": attempt(lambda compiled=compiled: compiled, options.rounds),
            }
            print(f"batch {batch:4} {name:20} {row['ms'][name]}", flush=True)
        print(f"batch {batch:4} predicted gain of fusion: {row['predicted_gain_ms']:.3f} ms")
        rows.append(row)
    dist.destroy_process_group()
    finish(
        __file__,
        {"gpu": gpu(), "copy_bytes_per_ms": bandwidth, "batches": rows},
        save=options.save,
    )


if __name__ == "__main__":
    main()
