"""The mathematics of two normalized branches that are added, in plain, differentiable torch.

It continues :mod:`bnrewrite.reference`, with the same arguments and letters.
"""

from torch import Tensor

from bnrewrite import activations
from bnrewrite.reference import (
    accumulate_dtype,
    affine,
    normalize,
    normalize_backward,
    normalize_backward_reduce,
    statistics,
)


def normalize_two(
    other: Tensor,
    other_totals: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    other_eps: float,
    x: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str = "identity",
    slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normalize`` of ``x`` with the normalized ``other`` as its residual.

    Returns:
        y, as ``x``; stats (2, C) of ``x`` and of ``other``.
    """
    acc = accumulate_dtype(other.dtype)
    other_stats = statistics(other_totals, other_eps, acc)
    residual = affine(other, other_stats, other_weight, other_bias)
    y, stats = normalize(x, totals, weight, bias, eps, residual, activation, slope)
    return y, stats, other_stats


def activation_of_two_backward(
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
) -> Tensor:
    """Gradient of the sum that was activated, which is computed again; in ``acc``."""
    if activation == "identity":
        return grad
    z = affine(x, stats, weight, bias) + affine(other, other_stats, other_weight, other_bias)
    return activations.activation_backward(grad.to(z.dtype), z, activation, slope)


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
    """``normalize_backward_reduce`` of both inputs of :func:`normalize_two`.

    Returns:
        Sums (2C,), float64, of ``other`` and of ``x``.
    """
    inner = activation_of_two_backward(
        grad, other, other_stats, other_weight, other_bias, x, stats, weight, bias,
        activation, slope,
    )  # fmt: skip
    return (
        normalize_backward_reduce(inner, other, other_stats),
        normalize_backward_reduce(inner, x, stats),
    )


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
    """``normalize_backward`` of both inputs of :func:`normalize_two`.

    Returns:
        Gradients of ``other`` and of ``x``.
    """
    inner = activation_of_two_backward(
        grad, other, other_stats, other_weight, other_bias, x, stats, weight, bias,
        activation, slope,
    )  # fmt: skip
    return (
        normalize_backward(inner, other, other_stats, other_totals, other_weight, other_sums),
        normalize_backward(inner, x, stats, totals, weight, sums),
    )
