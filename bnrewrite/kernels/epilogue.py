"""What follows a normalisation, as ATen calls: the residual and the activation.

Bytes: add_activation_ reads y and the residual and writes y, from and to the cache where the caller
works in pieces; activation_backward reads g and what is kept and writes the result.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bnrewrite import reference
from bnrewrite.activations import activate_, activation_backward, derivative_follows_from_result

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
    if kept is not None and derivative_follows_from_result(activation):
        return activation_backward(grad, kept, activation, slope)
    z = reference.affine(x, stats, weight, bias)
    z = z if kept is None else z + kept
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
        x: Tensor,
        stats: Tensor,
        kept: Tensor | None,
        activation: str,
        slope: float,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`bnrewrite.two_branches.normalize_two_backward_reduce`."""
        inner = through_activation(grad, x, stats, None, None, kept, activation, slope)
        return reduce(inner, other, other_stats), reduce(inner, x, stats)

    return normalize_two_backward_reduce


def normalize_two_backward_with(
    normalize_backward: Callable[..., Tensor],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel of ``normalize_two_backward`` on the device of ``normalize_backward``."""

    def normalize_two_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """See :func:`bnrewrite.two_branches.normalize_two_backward`."""
        other, own, (kept, *act) = args[:5], args[5:10], args[10:]
        inner = through_activation(grad, own[0], own[1], None, None, kept, *act)
        return normalize_backward(inner, *other), normalize_backward(inner, *own)

    return normalize_two_backward
