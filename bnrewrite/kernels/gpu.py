"""Kernels for CUDA tensors: Triton's where it can run them, else ATen's.

Triton needs a package that imports, a device that it compiles for (compute capability 8.0, or ROCm)
and a dense contiguous or channels-last tensor. BNREWRITE_KERNELS=aten leaves it out.
"""

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import cuda
from bnrewrite.kernels.epilogue import (
    normalize_two_backward_reduce_with,
    normalize_two_backward_with,
    normalize_two_with,
)
from bnrewrite.kernels.statistics import Running, recomputes, statistics_table, track
from bnrewrite.settings import kernels_setting

if TYPE_CHECKING:
    from bnrewrite.kernels.triton.launch import Normalized
    from bnrewrite.kernels.triton.plan import Plan


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on ``device``."""
    if importlib.util.find_spec("triton") is None or kernels_setting() == "aten":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _plan(x: Tensor) -> "Plan | None":
    if not runs_triton(x.device):
        return None
    from bnrewrite.kernels.triton.plan import plan_of

    return plan_of(x)


def _as(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """``others`` in the layout of ``x``: one copy where they are not."""
    return [
        other
        if other is None or _same_layout(x, other)
        else torch.empty_like(x, dtype=other.dtype).copy_(other)
        for other in others
    ]


def _same_layout(x: Tensor, other: Tensor) -> bool:
    return all(
        size == 1 or mine == its
        for size, mine, its in zip(x.shape, x.stride(), other.stride(), strict=True)
    )


def moments(x: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.moments`."""
    plan = _plan(x) if x.numel() else None
    if plan is None:
        return cuda.moments(x)
    from bnrewrite.kernels.triton import launch

    packed = x.new_empty(2 * x.size(1) + 1, dtype=torch.float64)
    launch.moments(plan, x, packed).run()
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
    empty = x.numel() == 0
    plan = None if empty else _plan(x)
    running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
    if plan is None and not (empty and runs_triton(x.device)):
        return cuda.normalize(x, totals, weight, bias, eps, *running, residual, activation, slope)
    from bnrewrite.kernels.triton import launch

    y = torch.empty_like(x)
    own = _normalized(x, totals, weight, bias, eps, running)
    (residual,) = _as(x, residual)
    launch.normalize(plan, x, residual, y, own, None, activation, slope).run()
    return y, own.stats


def _normalized(
    x: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running,
) -> "Normalized":
    """What a kernel needs of a normalisation; running statistics that it cannot move have moved."""
    from bnrewrite.kernels.triton.launch import Normalized

    acc = reference.accumulate_dtype(x.dtype)
    if running[4] or recomputes():
        # Rare enough for launches of its own.
        known_nonempty = x.numel() > 0
        table = statistics_table(totals, eps, acc, known_nonempty=known_nonempty)
        track(table, totals, running, known_nonempty=known_nonempty)
        running = (None, None, None, running[3], False)
    stats = x.new_empty((2, x.size(1)), dtype=acc)
    return Normalized(totals, (weight, bias), stats, running[:4], eps)


def normalize_two(
    other: Tensor,
    other_totals: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    other_eps: float,
    other_running_mean: Tensor | None,
    other_running_var: Tensor | None,
    other_num_batches_tracked: Tensor | None,
    other_momentum: float | None,
    other_skip_nonfinite: bool,
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
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`bnrewrite.two_branches.normalize_two`; updates the running statistics too."""
    running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
    others = (
        other_running_mean, other_running_var, other_num_batches_tracked, other_momentum,
        other_skip_nonfinite,
    )  # fmt: skip
    plan = _plan(x) if x.numel() else None
    if plan is None:
        return _normalize_two(
            other, other_totals, other_weight, other_bias, other_eps, *others,
            x, totals, weight, bias, eps, *running, activation, slope,
        )  # fmt: skip
    from bnrewrite.kernels.triton import launch

    y = torch.empty_like(x)
    # In this order, if they move the same running statistics.
    second = _normalized(x, other_totals, other_weight, other_bias, other_eps, others)
    first = _normalized(x, totals, weight, bias, eps, running)
    (other_like_x,) = _as(x, other)
    launch.normalize(plan, x, other_like_x, y, first, second, activation, slope).run()
    return y, first.stats, second.stats


_normalize_two = normalize_two_with(normalize)


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
    plan = _plan(x) if x.numel() else None
    if plan is None:
        return cuda.activation_backward_reduce(
            grad, x, stats, weight, bias, kept, activation, slope, write
        )
    from bnrewrite.kernels.triton import launch

    inner = torch.empty_like(x) if write else None
    sums = x.new_empty(2 * x.size(1), dtype=torch.float64)
    grad_like_x, kept = _as(x, grad, kept)
    assert grad_like_x is not None
    own = launch.Reduced(x, stats, sums)
    launch.normalize_backward_reduce(
        plan, grad_like_x, own, None, kept, (weight, bias), inner, activation, slope
    ).run()
    return sums, x.new_empty(0) if inner is None else inner


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
    plan = _plan(x) if x.numel() else None
    if plan is None:
        return cuda.normalize_backward(
            grad, x, stats, totals, weight, sums, bias, kept, activation, slope
        )
    from bnrewrite.kernels.triton import launch

    dx = torch.empty_like(x)
    grad_like_x, kept = _as(x, grad, kept)
    assert grad_like_x is not None
    own = launch.Applied(x, dx, stats, totals, weight, sums)
    launch.normalize_backward(plan, grad_like_x, own, None, kept, bias, activation, slope).run()
    return dx


def normalize_two_backward_reduce(
    grad: Tensor,
    other: Tensor,
    other_stats: Tensor,
    x: Tensor,
    stats: Tensor,
    kept: Tensor | None,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`bnrewrite.two_branches.normalize_two_backward_reduce`."""
    plan = _plan(x) if x.numel() else None
    if plan is None:
        return _normalize_two_backward_reduce(
            grad, other, other_stats, x, stats, kept, activation, slope
        )
    from bnrewrite.kernels.triton import launch

    grad_like_x, other_like_x, kept = _as(x, grad, other, kept)
    assert grad_like_x is not None
    assert other_like_x is not None
    own = launch.Reduced(x, stats, x.new_empty(2 * x.size(1), dtype=torch.float64))
    second = launch.Reduced(other_like_x, other_stats, torch.empty_like(own.sums))
    launch.normalize_backward_reduce(
        plan, grad_like_x, own, second, kept, (None, None), None, activation, slope
    ).run()
    return second.sums, own.sums


_normalize_two_backward_reduce = normalize_two_backward_reduce_with(normalize_backward_reduce)


def normalize_two_backward(
    grad: Tensor,
    other: Tensor,
    other_stats: Tensor,
    other_totals: Tensor,
    other_weight: Tensor | None,
    other_sums: Tensor,
    x: Tensor,
    stats: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    kept: Tensor | None,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`bnrewrite.two_branches.normalize_two_backward`."""
    plan = _plan(x) if x.numel() else None
    if plan is None:
        return _normalize_two_backward(
            grad, other, other_stats, other_totals, other_weight, other_sums,
            x, stats, totals, weight, sums, kept, activation, slope,
        )  # fmt: skip
    from bnrewrite.kernels.triton import launch

    grad_like_x, other_like_x, kept = _as(x, grad, other, kept)
    assert grad_like_x is not None
    assert other_like_x is not None
    own = launch.Applied(x, torch.empty_like(x), stats, totals, weight, sums)
    second = launch.Applied(
        other_like_x, torch.empty_like(other_like_x), other_stats, other_totals, other_weight,
        other_sums,
    )  # fmt: skip
    launch.normalize_backward(plan, grad_like_x, own, second, kept, None, activation, slope).run()
    (other_dx,) = _as(other, second.dx)
    assert other_dx is not None
    return other_dx, own.dx


_normalize_two_backward = normalize_two_backward_with(normalize_backward)
