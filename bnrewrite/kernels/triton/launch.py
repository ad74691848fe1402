"""The launches of the kernels: with which arguments which of them runs, in how many programs."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from bnrewrite.kernels.triton.launcher import Launch
from bnrewrite.kernels.triton.moments import moments_kernel
from bnrewrite.kernels.triton.normalize import BOOK, normalize_kernel
from bnrewrite.kernels.triton.normalize_backward import normalize_backward_kernel
from bnrewrite.kernels.triton.normalize_backward_reduce import normalize_backward_reduce_kernel
from bnrewrite.kernels.triton.plan import NOTHING, Plan
from bnrewrite.kernels.triton.workspace import workspace

_LIGHT = ("identity", "relu", "relu6", "leaky_relu")
"""Activations whose derivative is a choice."""


def _is_tight(plan: Plan, x: Tensor) -> bool:
    """Whether ptxas is known to spill, for some target and activation, where it has the choice.

    Wide values take registers, and so do single ones, each of which has an address and a mask, and
    columns that are parts of channels, each of which has its own statistics.
    """
    return x.dtype == torch.float64 or plan.VEC == 1 or plan.GROUP > 0


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
    def tensors(self) -> tuple[Tensor | None, ...]:
        """As kernels take them."""
        return (self.totals, *self.affine, self.stats, *self.running[:3])

    @property
    def numbers(self) -> tuple[float, float]:
        """As kernels take them."""
        return self.eps, self.running[3] or 0.0


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
        (num_books + plan.num_blocks * plan.num_splits, 1, 1),
        (x, residual, y, total, *own.tensors, *([None] * 7 if other is None else other.tensors)),
        (
            *own.numbers, *((0.0, 0.0) if other is None else other.numbers), slope,
            *plan.sizes, plan.num_blocks, num_books,
        ),
        plan,
        (
            ("ACTIVATION", activation), ("CUMULATIVE", own.cumulative),
            ("OTHER_CUMULATIVE", other is not None and other.cumulative), ("BOOK", BOOK),
        ),
        plan.num_warps,
        never_spills=_is_tight(plan, x) or other is not None,
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
    room = workspace(plan, own.x, 2 if other is None else 3)
    is_light = activation in _LIGHT and other is None
    return Launch(
        normalize_backward_reduce_kernel,
        (plan.num_blocks, plan.num_splits, 1),
        (grad, *own, *(other or [None] * 6), kept, grad_residual, *room),
        (slope, *plan.sizes),
        plan,
        (("ACTIVATION", activation), *plan.of_sums),
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
        (plan.num_blocks * plan.num_splits, 1, 1),
        (grad, *own, *(other or [None] * 7), kept),
        (slope, *plan.sizes, plan.num_blocks),
        plan,
        (("ACTIVATION", activation),),
        # What derivatives compute in float64 takes most registers of all.
        min(2 * plan.num_warps, 8) if is_wide and activation != "identity" else plan.num_warps,
        never_spills=_is_tight(plan, own.x) or other is not None,
    )
