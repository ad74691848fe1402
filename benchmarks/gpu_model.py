"""A training step of ResNet-50 on a GPU: eager, compiled, and as a CUDA graph.

Ours against ``nn.SyncBatchNorm`` and local BatchNorm, in bfloat16 autocast and channels-last. The
process is one of two ranks of a group that answers without communicating, so that both
synchronized models do all of their work but for the collectives themselves. Beside each difference
stands the prediction: the bytes that our kernels move less, over the bandwidth of a large copy.

Bar: faster than ``nn.SyncBatchNorm`` in each of the three forms.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
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


def _gather_without_communicating(output: Tensor, values: Tensor, *_: Any, **__: Any) -> None:
    """As the group answers other collectives; it would refuse the shape that torch asks for."""
    output.view(-1, values.numel()).copy_(values.view(1, -1))


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

    def replay(_: object = step) -> None:
        # What the graph works on lives as long as the step.
        graph.replay()

    return replay


FORMS: dict[str, Callable[[nn.Module, Tensor, Tensor], Callable[[], object]]] = {
    "eager": step_of,
    "graph": lambda model, x, labels: graphed(step_of(model, x, labels)),
    "compiled": lambda model, x, labels: step_of(
        torch.compile(copy.deepcopy(model), dynamic=False),  # pyright: ignore
        x,
        labels,
    ),
}
FORMS["compiled graph"] = lambda *args: graphed(FORMS["compiled"](*args))


def timed_together(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of steps that take turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(-3, repeats):
        for name, step in steps.items():
            time = timed(step, repeats=1, warmup=0)
            if index >= 0:
                times[name].append(time)
    return times


def attempt(make: Callable[[], Callable[[], object]]) -> Callable[[], object] | str:
    """A step that has run, or why it does not: nn.SyncBatchNorm does not compile whole."""
    try:
        step = make()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    except Exception as error:
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return step


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


def measured(batch: int, forms: Sequence[str], names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of a step in each form, of the models taking turns."""
    x = torch.randn(batch, 3, 224, 224, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device="cuda")
    made = models()
    row: dict[str, Any] = {"batch": batch, "saved_bytes": saved_bytes(x)}
    for form in forms:
        steps = {
            name: attempt(lambda model=model, form=form: FORMS[form](model, x, labels))
            for name, model in made.items()
            if name in names
        }
        times = timed_together({k: v for k, v in steps.items() if not isinstance(v, str)}, rounds)
        medians = {name: statistics.median(each) for name, each in times.items()}
        failures = {name: step for name, step in steps.items() if isinstance(step, str)}
        row[form] = medians | failures
        print(f"batch {batch:4} {form:9} {row[form]}", flush=True)
    return row


def main() -> None:
    switches = {
        "compiled": "batch 32, compiled, only",
        "graphed": "batch 32, compiled and captured, ours and local only",
    }
    options = arguments(__doc__, rounds=30, switches=switches)
    batches, forms, names, part = (8, 32, 128), ("eager", "graph"), MODELS, ""
    if options.compiled:
        # A compiler fuses what follows a site by itself, too.
        batches, forms, part = (32,), ("compiled",), "_compiled"
        names = tuple(name for name in MODELS if name != "ours without fusion")
    elif options.graphed:
        # What the device does: our kernels, or those that a compiler makes of local BatchNorm.
        batches, forms, part = (32,), ("compiled graph",), "_graphed"
        names = ("ours", "local")
    require_gpu()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    dist.all_gather_into_tensor = _gather_without_communicating  # pyright: ignore
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth: {bandwidth / 1e9:.2f} TB/s; times in ms per step")
    rows = []
    for batch in batches:
        row = measured(batch, forms, names, options.rounds)
        row["predicted_gain_ms"] = row.pop("saved_bytes") / bandwidth
        print(f"batch {batch:4} predicted gain of fusion: {row['predicted_gain_ms']:.3f} ms")
        rows.append(row)
    dist.destroy_process_group()
    record = {"gpu": gpu(), "copy_bytes_per_ms": bandwidth, "batches": rows}
    finish(__file__, record, save=options.save, part=part)


if __name__ == "__main__":
    main()
