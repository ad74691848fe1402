"""Collectives and bytes of a training step for 1 to 1024 ranks, against ``nn.SyncBatchNorm``.

One process stands for one rank of a world that torch's fake process group pretends to be: whatever
is issued is counted, nothing is sent. ``nn.SyncBatchNorm`` knows no CPU kernels; its own autograd
function runs here with stand-ins for the kernels, which changes nothing about what it communicates.
Bytes are those of the tensors that collectives hand to each rank.
"""

import argparse
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from measure import finish
from models import torchvision_model
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bnrewrite

WORLD_SIZES = (1, 2, 8, 64, 256, 1024)


class Count(TorchDispatchMode):
    """Collectives under it, and the bytes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and func._opname != "wait_tensor":
            self.calls += 1
            # The first tensor is the result, or as large as the result.
            result = next(arg for arg in tree_leaves(args) if isinstance(arg, Tensor))
            self.bytes += result.numel() * result.element_size()
        return func(*args, **(kwargs or {}))


class TorchSync(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` past its check for a GPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Calls the autograd function of ``nn.SyncBatchNorm``."""
        group: Any = dist.group.WORLD
        if group.size() == 1:
            return super().forward(input)
        return SyncBatchNorm.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps,
            self.momentum, group, group.size(),
        )  # fmt: skip


def _stand_ins() -> dict[str, Any]:
    """The kernels that exist for GPUs only, as far as shapes go."""

    def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.mean((0, 2, 3)), x.new_ones(x.size(1))

    def gather(x: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return mean[0], mean.new_ones(mean.size(1))

    def elemt(x: Tensor, *_: Any) -> Tensor:
        return x.clone()

    def reduce(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, ...]:
        sums = grad.sum((0, 2, 3))
        return sums, sums.clone(), sums.clone(), sums.clone()

    return {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": reduce,
        "batch_norm_backward_elemt": elemt,
    }


_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""The function that ``nn.SyncBatchNorm`` calls, by version of torch."""

_all_gather = getattr(dist, _GATHER)


def _flat_all_gather(out: Tensor, part: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The fake process group knows flat results only."""
    return _all_gather(out.view(-1), part, *args, **kwargs)


def _torch_sync(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = TorchSync
    return model


def _count(model: nn.Module) -> list[int]:
    x = torch.randn(2, 3, 64, 64)
    found = []
    with (
        mock.patch.multiple(torch, **_stand_ins()),
        mock.patch.object(dist, _GATHER, _flat_all_gather),
    ):
        with Count() as forward:
            out = model(x).sum()
        with Count() as backward:
            out.backward()
    for count in (forward, backward):
        found += [count.calls, count.bytes]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a classifier of torchvision")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/payload.json")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    print(f"{options.model}: collectives and KiB per training step, forward + backward")
    print(f"{'ranks':>6}{'bnrewrite':>26}{'nn.SyncBatchNorm':>34}")
    for world_size in WORLD_SIZES:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        ours = _count(bnrewrite.convert(torchvision_model(options.model)))
        theirs = _count(_torch_sync(torchvision_model(options.model)))
        dist.destroy_process_group()
        rows[str(world_size)] = {"bnrewrite": ours, "nn.SyncBatchNorm": theirs}
        texts = [
            f"{a} + {b} with {kib_a / 1024:,.0f} + {kib_b / 1024:,.0f}"
            for a, kib_a, b, kib_b in (ours, theirs)
        ]
        print(f"{world_size:>6}{texts[0]:>26}{texts[1]:>34}", flush=True)
    result = {
        "model": options.model,
        "columns": ["collectives forward", "bytes forward", "collectives backward",
                    "bytes backward"],
        "ranks": rows,
    }  # fmt: skip
    finish(__file__, result, save=options.save)


if __name__ == "__main__":
    main()
