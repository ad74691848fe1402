"""Host time of a site on the path of GPUs, with all that a GPU and a network do left out.

CPU tensors stand for a GPU's and code that does nothing for compiled kernels, so this runs without
a GPU and shows what Python takes: checks, autograd, what launches need. Forward plus backward of a
BatchNorm and a ReLU in a captured graph, whose statistics are shared; torch's two layers on a tiny
tensor are the measure of how fast the machine is.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from measure import arguments, finish, interleaved, leave_out_collectives
from torch import Tensor, nn
from triton.runtime.jit import JITFunction

import bnrewrite
from bnrewrite.kernels import gpu
from bnrewrite.kernels.triton import launch
from bnrewrite.kernels.triton.launcher import Launch
from bnrewrite.kernels.triton.plan import Plan
from bnrewrite.ops import library, normalize_sites, sites

SHAPE = (4, 64, 8, 8)
NUM_SITES = 10


class Block(nn.Module):
    """A BatchNorm and what is fused with it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(SHAPE[1])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes and activates ``x`` (N, C, H, W)."""
        return self.relu(self.bn(x))


class NoKernel:
    """Compiled code as Triton gives it, which does nothing."""

    n_regs = 64
    n_spills = 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args, stream: None


def stand_for_a_gpu() -> None:
    """Makes CPU tensors take the path of a GPU's."""
    leave_out_collectives()
    counters = torch.zeros(1 << 12, dtype=torch.int32)

    def workspace(plan: Plan, x: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        size = plan.num_partials * num_rows * plan.C
        return x.new_empty(size, dtype=torch.float64), counters

    for op, (_, cuda) in library.KERNELS.items():
        library.KERNELS[op] = cuda, cuda

    def first(_: object) -> int:
        return 0

    replaced: list[tuple[Any, str, Any]] = [
        (gpu, "runs_triton", lambda _: True),
        (launch, "workspace", workspace),
        (sites, "prefers_recomputing", lambda _: True),
        (normalize_sites, "hides_collectives", lambda _: False),
        (Launch, "run", lambda one: one._run_on(0)),
        (JITFunction, "warmup", lambda *_, **__: NoKernel()),
    ]
    for holder, name, value in replaced:
        mock.patch.object(holder, name, value).start()
    mock.patch.object(torch._C, "_cuda_getCurrentRawStream", first, create=True).start()


def step(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], object]:
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    inputs = (x, *model.parameters())
    return lambda: torch.autograd.grad(model(x), inputs, grad)


def main() -> None:
    options = arguments(__doc__, rounds=40)
    torch.set_num_threads(1)
    stand_for_a_gpu()
    ours = bnrewrite.convert(nn.Sequential(*[Block() for _ in range(NUM_SITES)]))
    steps = {
        "ours": step(ours, SHAPE),
        "torch": step(nn.Sequential(*[Block() for _ in range(NUM_SITES)]), (2, SHAPE[1], 1, 1)),
    }
    seconds = interleaved(steps, rounds=options.rounds, calls=20, clock=time.process_time)
    microseconds = {
        name: 1e6 * statistics.median(times) / NUM_SITES for name, times in seconds.items()
    }
    for name, value in microseconds.items():
        print(f"{name:>6}: {value:6.1f} us per site")
    finish(__file__, {"shape": list(SHAPE), "microseconds": microseconds}, save=options.save)


if __name__ == "__main__":
    main()
