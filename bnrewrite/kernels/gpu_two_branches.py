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
    launches,
    normalize,
    normalize_backward,
    normalize_backward_reduce,
    normalized,
    plan_for,
    sums_of,
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
    plan = plan_for(x)
    if plan is None:
        return _normalize_two(
            other, other_totals, other_weight, other_bias, other_eps, *others,
            x, totals, weight, bias, eps, *running, activation, slope,
        )  # fmt: skip
    y = torch.empty_like(x)
    # In this order, if they move the same running statistics.
    second = normalized(x, other_totals, other_weight, other_bias, other_eps, others)
    first = normalized(x, totals, weight, bias, eps, running)
    other = laid_out_as(x, other)
    launches().normalize(plan, x, other, y, None, first, second, activation, slope).run()
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
    plan = plan_for(x, reads=3)
    if plan is None:
        return _normalize_two_backward_reduce(
            grad, other, other_stats, other_weight, other_bias, x, stats, weight, bias,
            activation, slope,
        )  # fmt: skip
    own = sums_of(x, stats, weight, bias)
    second = sums_of(laid_out_as(x, other), other_stats, other_weight, other_bias)
    grad = laid_out_as(x, grad)
    launches().normalize_backward_reduce(
        plan, grad, own, second, None, None, activation, slope
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
    plan = plan_for(x)
    if plan is None:
        return _normalize_two_backward(
            grad, other, other_stats, other_totals, other_weight, other_bias, other_sums,
            x, stats, totals, weight, bias, sums, activation, slope,
        )  # fmt: skip
    affine = in_one_piece(weight), in_one_piece(bias)
    own = launches().Applied(x, torch.empty_like(x), stats, totals, *affine, sums)
    other_like_x = laid_out_as(x, other)
    second = launches().Applied(
        other_like_x, torch.empty_like(other_like_x), other_stats, other_totals,
        in_one_piece(other_weight), in_one_piece(other_bias), other_sums,
    )  # fmt: skip
    grad = laid_out_as(x, grad)
    launches().normalize_backward(plan, grad, own, second, None, activation, slope).run()
    return laid_out_as(other, second.dx), own.dx


_normalize_two_backward = normalize_two_backward_with(normalize_backward)
