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
from bnrewrite.kernels.epilogue import normalize_keep_sum_with
from bnrewrite.kernels.statistics import (
    Running,
    leave_gradients,
    recomputes,
    statistics_table,
    track,
)
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


def plan_for(x: Tensor, *, reads: int = 0) -> "Plan | None":
    """How Triton's kernels cut ``x``, not empty; None if none of them runs on it.

    ``reads`` is how many tensors a reduction reads, and 0 for a pass that writes what it reads.
    """
    if not runs_triton(x.device):
        return None
    from bnrewrite.kernels.triton.plan import plan_of

    return plan_of(x, reads=reads)


def laid_out_as(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """``others`` in the layout of ``x``: one copy where they are not."""
    return [
        other
        if other is None or _same_layout(x, other)
        else torch.empty_like(x, dtype=other.dtype).copy_(other)
        for other in others
    ]


def in_one_piece(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``weight`` and ``bias`` (C,) with their values next to each other, as kernels read them."""
    if _are_dense(weight, bias):
        return weight, bias
    return (
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )


def _are_dense(one: Tensor | None, other: Tensor | None) -> bool:
    return (one is None or one.is_contiguous()) and (other is None or other.is_contiguous())


def _same_layout(x: Tensor, other: Tensor) -> bool:
    return x.stride() == other.stride() or all(
        size == 1 or mine == its
        for size, mine, its in zip(x.shape, x.stride(), other.stride(), strict=True)
    )


def moments(x: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.moments`."""
    plan = plan_for(x, reads=1) if x.numel() else None
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
    plan = None if empty else plan_for(x)
    running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
    if plan is None and not (empty and runs_triton(x.device)):
        return cuda.normalize(x, totals, weight, bias, eps, *running, residual, activation, slope)
    from bnrewrite.kernels.triton import launch

    y = torch.empty_like(x)
    own = normalized(x, totals, weight, bias, eps, running)
    (residual,) = laid_out_as(x, residual)
    launch.normalize(plan, x, residual, y, None, own, None, activation, slope).run()
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
    plan = plan_for(x) if x.numel() else None
    if plan is None:
        affine = (weight, bias, eps)
        return _normalize_keep_sum(x, totals, *affine, *running, residual, activation, slope)
    from bnrewrite.kernels.triton import launch

    y, total = torch.empty_like(x), torch.empty_like(x)
    own = normalized(x, totals, weight, bias, eps, running)
    (residual_like_x,) = laid_out_as(x, residual)
    launch.normalize(plan, x, residual_like_x, y, total, own, None, activation, slope).run()
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
    """What a kernel needs of a normalisation; running statistics that it cannot move have moved."""
    from bnrewrite.kernels.triton.launch import Normalized

    acc = reference.accumulate_dtype(x.dtype)
    if running[4] or recomputes() or not _are_dense(running[0], running[1]):
        # Rare enough for launches of its own.
        known_nonempty = x.numel() > 0
        table = statistics_table(totals, eps, acc, known_nonempty=known_nonempty)
        track(table, totals, running, known_nonempty=known_nonempty)
        running = (None, None, None, running[3], False)
    stats = x.new_empty((2, x.size(1)), dtype=acc)
    return Normalized(totals, in_one_piece(weight, bias), stats, running[:4], eps)


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
    plan = plan_for(x, reads=2) if x.numel() else None
    if plan is None:
        return cuda.activation_backward_reduce(
            grad, x, stats, weight, bias, kept, activation, slope, write
        )
    from bnrewrite.kernels.triton import launch

    inner = torch.empty_like(x) if write else None
    sums = x.new_empty(2 * x.size(1), dtype=torch.float64)
    grad_like_x, kept = laid_out_as(x, grad, kept)
    assert grad_like_x is not None
    affine = in_one_piece(weight, bias)
    own = launch.Reduced(x, stats, *affine, sums, with_gradients(sums, stats))
    launch.normalize_backward_reduce(
        plan, grad_like_x, own, None, kept, inner, activation, slope
    ).run()
    return sums, x.new_empty(0) if inner is None else inner


def with_gradients(sums: Tensor, stats: Tensor) -> Tensor:
    """Room for what ``sums`` (2C,) are in the dtype of ``stats``, which whoever has them finds."""
    gradients = torch.empty_like(sums, dtype=stats.dtype)
    leave_gradients(sums, gradients)
    return gradients


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
    plan = plan_for(x) if x.numel() else None
    if plan is None:
        return cuda.normalize_backward(
            grad, x, stats, totals, weight, sums, bias, kept, activation, slope
        )
    from bnrewrite.kernels.triton import launch

    dx = torch.empty_like(x)
    grad_like_x, kept = laid_out_as(x, grad, kept)
    assert grad_like_x is not None
    own = launch.Applied(x, dx, stats, totals, *in_one_piece(weight, bias), sums)
    launch.normalize_backward(plan, grad_like_x, own, None, kept, activation, slope).run()
    return dx
