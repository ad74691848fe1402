"""Launching the kernels: what a call allocates, and with which arguments which kernel runs."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels.triton.moments import moments_kernel
from bnrewrite.kernels.triton.normalize import BOOK, normalize_kernel
from bnrewrite.kernels.triton.normalize_backward import normalize_backward_kernel
from bnrewrite.kernels.triton.normalize_backward_reduce import normalize_backward_reduce_kernel
from bnrewrite.kernels.triton.plan import NOTHING, Plan

_ACC: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.float64: tl.float64}

_STAGES = 3
"""Tiles of a program that are on their way or used: what is loaded next does not wait."""

_MOST_REGISTERS = 255
"""Of a thread, on every GPU that Triton compiles for with ptxas."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: the kernel.
        grid: programs per dimension.
        args: values of the arguments that are no constants, in order.
        constants: values of the others.
        num_warps: warps of a program.
        never_spills: whether a thread gets the registers that it needs, however few programs then
            run at a time. By itself ptxas weighs one against the other, and may spill some bytes.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    never_spills: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told besides; multiply-adds are wanted whatever its default is."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if self.never_spills and torch.version.hip is None:
            options["maxnreg"] = _MOST_REGISTERS
        return options

    def run(self) -> None:
        """Launches on the device of the first argument, without waiting."""
        x = self.args[0]
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            self.kernel[self.grid](*self.args, **self.constants, **self.options)


def _constants(plan: Plan, x: Tensor, **more: Any) -> dict[str, Any]:
    return {
        "BLOCK_C": plan.BLOCK_C,
        "BLOCK_S": plan.BLOCK_S,
        "VEC": plan.VEC,
        "LAST": plan.LAST,
        "ACC": _ACC[reference.accumulate_dtype(x.dtype)],
        "STAGES": _STAGES,
        "GROUP": plan.GROUP,
        **more,
    }


def _is_tight(plan: Plan, x: Tensor) -> bool:
    """Whether ptxas is known to spill, for some target and activation, where it has the choice.

    Wide values take registers, and so do single ones, each of which has an address and a mask.
    """
    return x.dtype == torch.float64 or plan.VEC == 1


def _sums_constants(plan: Plan) -> dict[str, Any]:
    """Of reductions only."""
    return {"MERGE": plan.merge, "WIDE": 1 << max(plan.GROUP - 1, 0).bit_length()}


def _workspace(plan: Plan, x: Tensor, num_rows: int = 2) -> tuple[Tensor, Tensor]:
    """Room for partial sums (splits, rows, C), and a zero for each channel block."""
    num_splits = plan.num_splits
    if num_splits == 1:
        unused = x.new_empty(0, dtype=torch.float64)
        return unused, unused
    partials = x.new_empty((num_splits, num_rows, plan.C), dtype=torch.float64)
    return partials, _arrivals(x.device, plan.num_blocks)


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def _arrivals(device: torch.device, num_blocks: int) -> Tensor:
    """Counters at zero. Each launch leaves them so, and launches of one stream run in order.

    A graph gets its own: it may be replayed beside whatever runs on the stream of its capture.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(num_blocks, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    counters = _COUNTERS.get(key)
    if counters is None or counters.numel() < num_blocks:
        size = max(8192, num_blocks)
        counters = _COUNTERS[key] = torch.zeros(size, dtype=torch.int32, device=device)
    return counters


def moments(plan: Plan, x: Tensor, packed: Tensor) -> Launch:
    """Fills ``packed`` (2C + 1,), float64."""
    return Launch(
        moments_kernel,
        (plan.num_blocks, plan.num_splits),
        (x, *_workspace(plan, x), packed, *plan.sizes),
        _constants(plan, x, **_sums_constants(plan)),
        plan.num_warps,
        never_spills=_is_tight(plan, x),
    )


class Normalized(NamedTuple):
    """What one normalisation follows from besides its input, and what it writes besides y.

    Attributes:
        totals: (2C + 1,), float64.
        affine: weight and bias, (C,) each, or None.
        stats: (2, C), to be filled.
        running: what moves, and by what factor.
        eps: added to the variance.
    """

    totals: Tensor
    affine: tuple[Tensor | None, Tensor | None]
    stats: Tensor
    running: tuple[Tensor | None, Tensor | None, Tensor | None, float | None]
    eps: float

    @property
    def cumulative(self) -> bool:
        """Whether the running statistics are averages of all batches."""
        return self.running[3] is None

    @property
    def args(self) -> tuple[Any, ...]:
        """As kernels take them."""
        *running, momentum = self.running
        factor = 0.0 if momentum is None else momentum
        return (self.totals, *self.affine, self.stats, *running, self.eps, factor)


def normalize(
    plan: Plan | None,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    own: Normalized,
    other: Normalized | None,
    activation: str,
    slope: float,
) -> Launch:
    """Fills ``y`` and stats (2, C) and moves what is running; without a plan, all but ``y``.

    ``total`` is filled with what is activated, where it is given. With ``other`` the residual is
    normalised, too.
    """
    cumulative = own.cumulative or (other is not None and other.cumulative)
    num_books = 1 if cumulative else max(1, -(-x.size(1) // BOOK))
    if plan is None:
        plan = dataclasses.replace(NOTHING, C=x.size(1))
    return Launch(
        normalize_kernel,
        (num_books + plan.num_blocks * plan.num_splits,),
        (
            x, residual, y, total, *own.args, *(_NO_OTHER if other is None else other.args), slope,
            *plan.sizes, plan.num_blocks, num_books,
        ),
        _constants(
            plan, x, ACTIVATION=activation, CUMULATIVE=own.cumulative,
            OTHER_CUMULATIVE=other is not None and other.cumulative, BOOK=BOOK,
        ),
        plan.num_warps,
        never_spills=_is_tight(plan, x) or other is not None,
    )  # fmt: skip


_NO_OTHER = (*[None] * 7, 0.0, 0.0)


class Reduced(NamedTuple):
    """An input whose sums are wanted.

    Attributes:
        x: the input.
        stats: (2, C), of the forward.
        weight: (C,), or None; for an activation whose argument is computed again.
        bias: as ``weight``.
        sums: (2C,), float64, to be filled.
    """

    x: Tensor
    stats: Tensor
    weight: Tensor | None
    bias: Tensor | None
    sums: Tensor


def normalize_backward_reduce(
    plan: Plan,
    grad: Tensor,
    own: Reduced,
    other: Reduced | None,
    kept: Tensor | None,
    grad_residual: Tensor | None,
    activation: str,
    slope: float,
) -> Launch:
    """Fills the sums, float64, and ``grad_residual``; with ``other`` those of both branches."""
    workspace = _workspace(plan, own.x, 2 if other is None else 3)
    is_light = activation == "identity" and other is None
    return Launch(
        normalize_backward_reduce_kernel,
        (plan.num_blocks, plan.num_splits),
        (
            grad, *own, *(other or [None] * 5), kept, grad_residual, *workspace, slope,
            *plan.sizes,
        ),
        _constants(plan, own.x, ACTIVATION=activation, **_sums_constants(plan)),
        # Several accumulators and operands and what an activation needs: half as many per thread.
        plan.num_warps if is_light else min(2 * plan.num_warps, 8),
        never_spills=_is_tight(plan, own.x) or not is_light,
    )  # fmt: skip


class Applied(NamedTuple):
    """An input whose gradient is wanted.

    Attributes:
        x: the input.
        dx: its gradient, to be filled.
        stats: (2, C), of the forward.
        totals: (2C + 1,), float64, of the forward.
        weight: (C,), or None.
        bias: (C,), or None; for an activation whose argument is computed again.
        sums: (2C,), float64, of all ranks.
    """

    x: Tensor
    dx: Tensor
    stats: Tensor
    totals: Tensor
    weight: Tensor | None
    bias: Tensor | None
    sums: Tensor


def normalize_backward(
    plan: Plan,
    grad: Tensor,
    own: Applied,
    other: Applied | None,
    kept: Tensor | None,
    activation: str,
    slope: float,
) -> Launch:
    """Fills ``own.dx``; with ``other`` the gradients of both branches."""
    is_wide = own.x.dtype == torch.float64
    return Launch(
        normalize_backward_kernel,
        (plan.num_blocks * plan.num_splits,),
        (grad, *own, *(other or [None] * 7), kept, slope, *plan.sizes, plan.num_blocks),
        _constants(plan, own.x, ACTIVATION=activation),
        # What derivatives compute in float64 takes most registers of all.
        min(2 * plan.num_warps, 8) if is_wide and activation != "identity" else plan.num_warps,
        never_spills=_is_tight(plan, own.x) or other is not None,
    )
