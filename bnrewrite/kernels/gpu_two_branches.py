"""Kernels for two branches of CUDA tensors, each in one pass: see :mod:`bnrewrite.two_branches`."""

import torch
from torch import Tensor

from bnrewrite.kernels.epilogue import (
    normalize_two_backward_reduce_with,
    normalize_two_backward_with,
    normalize_two_with,
)
from bnrewrite.kernels.gpu import (
    in_one_piece,
    laid_out_as,
    normalize,
    normalize_backward,
    normalize_backward_reduce,
    normalized,
    plan_for,
    with_gradients,
)


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
    plan = plan_for(x) if x.numel() else None
    if plan is None:
        return _normalize_two(
            other, other_totals, other_weight, other_bias, other_eps, *others,
            x, totals, weight, bias, eps, *running, activation, slope,
        )  # fmt: skip
    from bnrewrite.kernels.triton import launch

    y = torch.empty_like(x)
    # In this order, if they move the same running statistics.
    second = normalized(x, other_totals, other_weight, other_bias, other_eps, others)
    first = normalized(x, totals, weight, bias, eps, running)
    (other_like_x,) = laid_out_as(x, other)
    launch.normalize(plan, x, other_like_x, y, None, first, second, activation, slope).run()
    return y, first.stats, second.stats


_normalize_two = normalize_two_with(normalize)


def normalize_two_backward_reduce(
    grad: Tensor,
    other: Tensor,
    other_stats: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`bnrewrite.two_branches.normalize_two_backward_reduce`."""
    plan = plan_for(x, reads=3) if x.numel() else None
    if plan is None:
        return _normalize_two_backward_reduce(
            grad, other, other_stats, other_weight, other_bias, x, stats, weight, bias,
            activation, slope,
        )  # fmt: skip
    from bnrewrite.kernels.triton import launch

    grad_like_x, other_like_x = laid_out_as(x, grad, other)
    assert grad_like_x is not None
    assert other_like_x is not None
    sums, other_sums = (x.new_empty(2 * x.size(1), dtype=torch.float64) for _ in range(2))
    affine, other_affine = in_one_piece(weight, bias), in_one_piece(other_weight, other_bias)
    own = launch.Reduced(x, stats, *affine, sums, with_gradients(sums, stats))
    second = launch.Reduced(
        other_like_x, other_stats, *other_affine, other_sums,
        with_gradients(other_sums, other_stats),
    )  # fmt: skip
    launch.normalize_backward_reduce(
        plan, grad_like_x, own, second, None, None, activation, slope
    ).run()
    return second.sums, own.sums


_normalize_two_backward_reduce = normalize_two_backward_reduce_with(normalize_backward_reduce)


def normalize_two_backward(
    grad: Tensor,
    other: Tensor,
    other_stats: Tensor,
    other_totals: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    other_sums: Tensor,
    x: Tensor,
    stats: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`bnrewrite.two_branches.normalize_two_backward`."""
    plan = plan_for(x) if x.numel() else None
    if plan is None:
        return _normalize_two_backward(
            grad, other, other_stats, other_totals, other_weight, other_bias, other_sums,
            x, stats, totals, weight, bias, sums, activation, slope,
        )  # fmt: skip
    from bnrewrite.kernels.triton import launch

    grad_like_x, other_like_x = laid_out_as(x, grad, other)
    assert grad_like_x is not None
    assert other_like_x is not None
    affine, other_affine = in_one_piece(weight, bias), in_one_piece(other_weight, other_bias)
    own = launch.Applied(x, torch.empty_like(x), stats, totals, *affine, sums)
    second = launch.Applied(
        other_like_x, torch.empty_like(other_like_x), other_stats, other_totals, *other_affine,
        other_sums,
    )  # fmt: skip
    launch.normalize_backward(plan, grad_like_x, own, second, None, activation, slope).run()
    (other_dx,) = laid_out_as(other, second.dx)
    assert other_dx is not None
    return other_dx, own.dx


_normalize_two_backward = normalize_two_backward_with(normalize_backward)
