"""A training step of ResNet-18 on two ranks: sync against local BatchNorm and a Python peer.

64x64 images, batch 8 on each rank, DistributedDataParallel, gloo, one thread per rank. Bars: at
most 1.25 times the step with local BatchNorm, and faster than the peer: the usual synchronized
BatchNorm in Python, which averages mean and mean of squares in a differentiable all-reduce.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import arguments, finish, interleaved, ratio
from models import torchvision_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnrewrite

WORLD_SIZE = 2
BATCH = 8
SIDE = 64


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in both directions."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class PeerBatchNorm(nn.BatchNorm2d):
    """Synchronized BatchNorm as it is usually written in Python, for equal batches on all ranks."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes with the averages over ranks of mean and mean of squares."""
        own = torch.cat((input.mean((0, 2, 3)), (input * input).mean((0, 2, 3))))
        mean, square = (_SumOverRanks.apply(own) / dist.get_world_size()).chunk(2)  # pyright: ignore
        var = square - mean * mean
        scale = self.weight * torch.rsqrt(var + self.eps)
        offset = self.bias - mean * scale
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(var, self.momentum or 0.0)
        return input * scale.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1)


def peer(model: nn.Module) -> nn.Module:
    """``model`` with the peer in place of every BatchNorm2d."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = PeerBatchNorm
    return model


def _resnet18() -> nn.Module:
    torch.manual_seed(0)
    return torchvision_model("resnet18", num_classes=10)


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(images), labels).backward()
        optimizer.step()

    return step


def _rank(rank: int, rendezvous: str, rounds: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE
    )
    torch.manual_seed(rank)
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(10, (BATCH,))
    models = {
        "local": _resnet18(),
        "sync": bnrewrite.convert(_resnet18()),
        "peer": peer(_resnet18()),
    }
    steps = {name: _step(model, images, labels) for name, model in models.items()}
    seconds = interleaved(steps, rounds=rounds, warmup=3)
    if rank == 0:
        torch.save(seconds, path)
    dist.barrier()
    # DDP's destructor can wait for ever once the group is gone: see examples/train_ddp.py.
    del steps
    dist.destroy_process_group()


def main() -> None:
    options = arguments(__doc__, rounds=40)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "seconds.pt"))
        torch.multiprocessing.spawn(
            _rank, (str(Path(folder, "rendezvous")), options.rounds, path), nprocs=WORLD_SIZE
        )
        seconds = torch.load(path)
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    over_local = ratio(seconds, "sync", "local")
    over_peer = ratio(seconds, "sync", "peer")
    for name, value in milliseconds.items():
        print(f"{name:>6}: {value:7.1f} ms per step")
    print(f"sync / local {over_local:.2f} (bar 1.25), sync / peer {over_peer:.2f} (bar 1)")
    result = {
        "milliseconds": milliseconds, "sync_over_local": over_local, "sync_over_peer": over_peer,
    }  # fmt: skip
    finish(__file__, result, save=options.save)


if __name__ == "__main__":
    main()
