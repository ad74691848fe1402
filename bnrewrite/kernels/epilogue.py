"""What follows a normalization, as ATen calls: the residual and the activation.

Bytes: add_activation_ reads y and the residual and writes y, from and to the cache where the caller
works in pieces; activation_backward reads g and what is kept and writes the result.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bnrewrite import reference
from bnrewrite.activations import activate, activate_, activation_backward
from bnrewrite.two_branches import activation_of_two_backward

NormalizeBackwardReduce = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_activation_(y: Tensor, residual: Tensor | None, activation: str, slope: float) -> None:
    """``y = act(y + residual)`` in place."""
    if residual is not None:
        y.add_(residual)
    activate_(y, activation, slope)


def through_activation(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str,
    slope: float,
) -> Tensor:
    """See :func:`bnrewrite.reference.activation_backward`; in the dtype of ``x``."""
    if activation == "identity" or x.numel() == 0:
        return grad
    if kept is not None:
        return activation_backward(grad, kept, activation, slope)
    z = reference.affine(x, stats, weight, bias)
    return activation_backward(grad.to(z.dtype), z, activation, slope).to(x.dtype)


def activation_backward_reduce_with(
    reduce: NormalizeBackwardReduce,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel of ``activation_backward_reduce`` on the device of ``reduce``."""

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
        inner = through_activation(grad, x, stats, weight, bias, kept, activation, slope)
        sums = reduce(inner, x, stats)
        if not write:
            return sums, x.new_empty(0)
        # The result of an op is a tensor of its own.
        return sums, inner.clone() if inner is grad else inner

    return activation_backward_reduce


def normalize_keep_sum_with(
    normalize: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The kernel of ``normalize_keep_sum`` on the device of ``normalize``."""

    def normalize_keep_sum(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`bnrewrite.reference.normalize_keep_sum`."""
        *others, activation, slope = args
        total, stats = normalize(x, *others)
        # The result of an op is a tensor of its own.
        y = total.clone() if activation == "identity" else activate(total, activation, slope)
        return y, stats, total

    return normalize_keep_sum


def normalize_two_with(
    normalize: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The kernel of ``normalize_two`` on the device of ``normalize``."""

    def normalize_two(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`bnrewrite.two_branches.normalize_two`."""
        other, own, act = args[:10], args[10:20], args[20:]
        residual, other_stats = normalize(*other)
        y, stats = normalize(*own, residual, *act)
        return y, stats, other_stats

    return normalize_two


def normalize_two_backward_reduce_with(
    reduce: NormalizeBackwardReduce,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel of ``normalize_two_backward_reduce`` on the device of ``reduce``."""

    def normalize_two_backward_reduce(
        grad: Tensor,
        other: Tensor,
        other_stats: Tensor,
        other_weight: Tensor | None,
        other_bias: Tensor | None,
        x: Tensor,
        stats: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`bnrewrite.two_branches.normalize_two_backward_reduce`."""
        inner = activation_of_two_backward(
            grad, other, other_stats, other_weight, other_bias, x, stats, *rest
        ).to(x.dtype)
        return reduce(inner, other, other_stats), reduce(inner, x, stats)

    return normalize_two_backward_reduce


def normalize_two_backward_with(
    normalize_backward: Callable[..., Tensor],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel of ``normalize_two_backward`` on the device of ``normalize_backward``."""

    def normalize_two_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """See :func:`bnrewrite.two_branches.normalize_two_backward`."""
        (other, other_stats, other_totals, other_weight, other_bias, other_sums) = args[:6]
        (x, stats, totals, weight, bias, sums), act = args[6:12], args[12:]
        inner = activation_of_two_backward(
            grad, other, other_stats, other_weight, other_bias, x, stats, weight, bias, *act
        ).to(x.dtype)
        return (
            normalize_backward(inner, other, other_stats, other_totals, other_weight, other_sums),
            normalize_backward(inner, x, stats, totals, weight, sums),
        )

    return normalize_two_backward
