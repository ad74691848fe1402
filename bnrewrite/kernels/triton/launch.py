"""The launches of the kernels: with which arguments which of them runs, in how many programs."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from bnrewrite.kernels.triton.launcher import MOST_REGISTERS, Launch
from bnrewrite.kernels.triton.moments import moments_kernel
from bnrewrite.kernels.triton.normalize import BOOK, normalize_kernel
from bnrewrite.kernels.triton.normalize_backward import normalize_backward_kernel
from bnrewrite.kernels.triton.normalize_backward_reduce import normalize_backward_reduce_kernel
from bnrewrite.kernels.triton.plan import NOTHING, Plan
from bnrewrite.kernels.triton.workspace import workspace

_LIGHT = ("identity", "relu", "relu6", "leaky_relu")
"""Activations whose derivative is a choice."""

_REGISTERS = 65536
"""Of a multiprocessor."""


def _for_partials(plan: Plan, num_warps: int) -> int:
    """Registers of a reduction: with few, partial sums are loaded one after another.

    Two programs of a multiprocessor run at a time, as a plan expects, unless ptxas would spill.
    """
    if plan.is_tight:
        return MOST_REGISTERS
    each = _REGISTERS // (2 * 32 * num_warps)
    return min(MOST_REGISTERS, each) if plan.num_partials else 0


def moments(plan: Plan, x: Tensor, packed: Tensor) -> Launch:
    """Fills ``packed`` (2C + 1,), float64."""
    return Launch(
        moments_kernel,
        (plan.num_blocks, plan.num_splits, 1),
        (x, *workspace(plan, x, 2), packed),
        plan.sizes,
        plan,
        plan.of_sums,
        plan.num_warps,
        _for_partials(plan, plan.num_warps),
    )


class Normalized(NamedTuple):
    """What one normalization follows from besides its input, and what it writes besides y.

    Attributes:
        tensors: totals (2C + 1,), float64, weight and bias, stats (2, C), which are to be filled,
            running_mean, running_var and num_batches_tracked, as kernels take them.
        numbers: eps, and the weight of the batch in the running statistics.
        cumulative: whether these are averages of all batches instead.
    """

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[float, float]
    cumulative: bool

    @property
    def stats(self) -> Tensor:
        """Mean and rstd."""
        stats = self.tensors[3]
        assert stats is not None
        return stats


_NO_OTHER = Normalized((None,) * 7, (0.0, 0.0), cumulative=False)


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
    normalized, too.
    """
    second = _NO_OTHER if other is None else other
    is_counted = own.cumulative or second.cumulative
    num_books = 1 if is_counted else max(1, -(-x.size(1) // BOOK))
    if plan is None:
        plan = dataclasses.replace(NOTHING, C=x.size(1))
    return Launch(
        normalize_kernel,
        (num_books + plan.num_blocks * plan.num_splits, 1, 1),
        (x, residual, y, total, *own.tensors, *second.tensors),
        (*own.numbers, *second.numbers, slope, *plan.sizes, plan.num_blocks, num_books),
        plan,
        (
            "ACTIVATION", activation, "CUMULATIVE", own.cumulative,
            "OTHER_CUMULATIVE", second.cumulative, "BOOK", BOOK,
        ),
        plan.num_warps,
        MOST_REGISTERS if plan.is_tight or other is not None else 0,
    )  # fmt: skip


class Reduced(NamedTuple):
    """An input whose sums are wanted.

    Attributes:
        x: the input.
        stats: (2, C), of the forward.
        weight: (C,), or None; for an activation whose argument is computed again.
        bias: as ``weight``.
        sums: (2C,), float64, to be filled.
        gradients: (2C,), or None: the sums again, in the dtype of ``stats``.
    """

    x: Tensor
    stats: Tensor
    weight: Tensor | None
    bias: Tensor | None
    sums: Tensor
    gradients: Tensor | None = None


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
    """Fills the sums, twice, and ``grad_residual``; with ``other`` the sums of both branches."""
    room = workspace(plan, own.x, 2 if other is None else 4)
    is_light = activation in _LIGHT and other is None
    # Several accumulators and operands and what an activation needs: half as many per thread.
    num_warps = plan.num_warps if is_light else min(2 * plan.num_warps, 8)
    bound = _for_partials(plan, num_warps)
    if other is not None and plan.tile.VEC == 2:
        # Pairs of two branches would spill on capability 10.
        bound = MOST_REGISTERS
    return Launch(
        normalize_backward_reduce_kernel,
        (plan.num_blocks, plan.num_splits, 1),
        (grad, *own, *(other or [None] * 6), kept, grad_residual, *room),
        (slope, *plan.sizes),
        plan,
        ("ACTIVATION", activation, *plan.of_sums),
        num_warps,
        bound or (0 if is_light else MOST_REGISTERS),
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
        (plan.num_blocks * plan.num_splits, 1, 1),
        (grad, *own, *(other or [None] * 7), kept),
        (slope, *plan.sizes, plan.num_blocks),
        plan,
        ("ACTIVATION", activation),
        # What derivatives compute in float64 takes most registers of all.
        min(2 * plan.num_warps, 8) if is_wide and activation != "identity" else plan.num_warps,
        MOST_REGISTERS if plan.is_tight or other is not None else 0,
    )
