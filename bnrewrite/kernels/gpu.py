"""Kernels for CUDA tensors: Triton's where it can run them, else ATen's.

Triton's need a device that they are compiled for (``triton/device.py``) and a dense tensor that is
contiguous or channels-last.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import cuda
from bnrewrite.kernels.epilogue import normalize_keep_sum_with
from bnrewrite.kernels.statistics import (
    Running,
    leave_gradients,
    recomputes,
    statistics_table,
    track,
)
from bnrewrite.kernels.triton.device import runs_triton
from bnrewrite.kernels.triton.plan import Plan, plan_of

if TYPE_CHECKING:
    from bnrewrite.kernels.triton.launch import Normalized, Reduced


@functools.cache
def launches() -> Any:
    """The module of launches, which imports Triton."""
    from bnrewrite.kernels.triton import launch

    return launch


def plan_for(x: Tensor, *, reads: int = 0) -> Plan | None:
    """How Triton's kernels cut ``x``; None if it is empty or none of them runs on it.

    ``reads`` is how many tensors a reduction reads, and 0 for a pass that writes what it reads.
    """
    return plan_of(x, reads=reads) if runs_triton(x.get_device()) else None


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """``other`` in the layout of ``x``, its values in memory: a copy where they are not."""
    if not other.is_neg() and (
        x.stride() == other.stride()
        or all(
            size == 1 or mine == its
            for size, mine, its in zip(x.shape, x.stride(), other.stride(), strict=True)
        )
    ):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def in_one_piece(vector: Tensor | None) -> Tensor | None:
    """A weight or bias (C,) with its values next to each other, as kernels read them."""
    if vector is None:
        return None
    return vector.resolve_neg() if vector.is_neg() else vector.contiguous()


def moments(x: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.moments`."""
    plan = plan_for(x, reads=1)
    if plan is None:
        return cuda.moments(x)
    packed = x.new_empty(2 * plan.C + 1, dtype=torch.float64)
    launches().moments(plan, x, packed).run()
    return packed


def normalize(
    x: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool = False,
    residual: Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See :func:`bnrewrite.reference.normalize`; updates the running statistics too."""
    plan = plan_for(x)
    running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
    if plan is None and (x.numel() > 0 or not runs_triton(x.get_device())):
        return cuda.normalize(x, totals, weight, bias, eps, *running, residual, activation, slope)
    y = torch.empty_like(x)
    own = normalized(x, totals, weight, bias, eps, running)
    if residual is not None:
        residual = laid_out_as(x, residual)
    launches().normalize(plan, x, residual, y, None, own, None, activation, slope).run()
    return y, own.stats


def normalize_keep_sum(
    x: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
    residual: Tensor,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`bnrewrite.reference.normalize_keep_sum`; updates the running statistics too."""
    running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
    plan = plan_for(x)
    if plan is None:
        affine = (weight, bias, eps)
        return _normalize_keep_sum(x, totals, *affine, *running, residual, activation, slope)
    y, total = torch.empty_like(x), torch.empty_like(x)
    own = normalized(x, totals, weight, bias, eps, running)
    residual = laid_out_as(x, residual)
    launches().normalize(plan, x, residual, y, total, own, None, activation, slope).run()
    return y, own.stats, total


_normalize_keep_sum = normalize_keep_sum_with(normalize)


def normalized(
    x: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running,
) -> "Normalized":
    """What a kernel needs of a normalization; running statistics that it cannot move have moved."""
    acc = reference.accumulate_dtype(x.dtype)
    running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite = running
    if (
        skip_nonfinite
        or recomputes()
        or not (running_mean is None or running_mean.is_contiguous())
        or not (running_var is None or running_var.is_contiguous())
        or not (num_batches_tracked is None or num_batches_tracked.device == x.device)
    ):
        # Rare enough for launches of its own.
        known_nonempty = x.numel() > 0
        table = statistics_table(totals, eps, acc, known_nonempty=known_nonempty)
        track(table, totals, running, known_nonempty=known_nonempty)
        running_mean = running_var = num_batches_tracked = None
    stats = x.new_empty((2, x.size(1)), dtype=acc)
    weight, bias = in_one_piece(weight), in_one_piece(bias)
    return launches().Normalized(
        (totals, weight, bias, stats, running_mean, running_var, num_batches_tracked),
        (eps, momentum or 0.0),
        momentum is None,
    )


def normalize_backward_reduce(grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.normalize_backward_reduce`."""
    return activation_backward_reduce(
        grad, x, stats, None, None, None, "identity", 0.0, write=False
    )[0]


def activation_backward_reduce(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str,
    slope: float,
    write: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`bnrewrite.reference.activation_backward_reduce`."""
    plan = plan_for(x, reads=2)
    if plan is None:
        return cuda.activation_backward_reduce(
            grad, x, stats, weight, bias, kept, activation, slope, write
        )
    inner = torch.empty_like(x) if write else None
    own = sums_of(x, stats, weight, bias)
    grad = laid_out_as(x, grad)
    if kept is not None:
        kept = laid_out_as(x, kept)
    launches().normalize_backward_reduce(
        plan, grad, own, None, kept, inner, activation, slope
    ).run()
    return own.sums, x.new_empty(0) if inner is None else inner


def sums_of(x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> "Reduced":
    """What a reduction of ``x`` needs and fills; whoever has its sums finds the gradients."""
    sums = stats.new_empty(stats.numel(), dtype=torch.float64)
    gradients = torch.empty_like(sums, dtype=stats.dtype)
    leave_gradients(sums, gradients)
    return launches().Reduced(x, stats, in_one_piece(weight), in_one_piece(bias), sums, gradients)


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
) -> Tensor:
    """See :func:`bnrewrite.reference.normalize_backward`."""
    plan = plan_for(x)
    if plan is None:
        return cuda.normalize_backward(
            grad, x, stats, totals, weight, sums, bias, kept, activation, slope
        )
    dx = torch.empty_like(x)
    affine = in_one_piece(weight), in_one_piece(bias)
    own = launches().Applied(x, dx, stats, totals, *affine, sums)
    grad = laid_out_as(x, grad)
    if kept is not None:
        kept = laid_out_as(x, kept)
    launches().normalize_backward(plan, grad, own, None, kept, activation, slope).run()
    return dx
