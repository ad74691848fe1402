"""What the backward of sites computes before its collective and after: sums, input gradients.

A site is a :class:`Gradient`, and a site together with the earlier one that is added to it, where
one kernel serves both, a :class:`GradientOfTwo`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrewrite.ops import sites as site_arguments
from bnrewrite.ops.activation_backward_reduce import ACTIVATION_BACKWARD_REDUCE
from bnrewrite.ops.library import run
from bnrewrite.ops.normalize_backward import NORMALIZE_BACKWARD
from bnrewrite.ops.normalize_backward_reduce import NORMALIZE_BACKWARD_REDUCE
from bnrewrite.ops.normalize_two_backward import NORMALIZE_TWO_BACKWARD
from bnrewrite.ops.normalize_two_backward_reduce import NORMALIZE_TWO_BACKWARD_REDUCE
from bnrewrite.ops.sites import memory_format

IDENTITY = ("identity", 0.0)
"""The activation of what is none."""


class Gradient(NamedTuple):
    """What the input gradient of one site follows from, but for the sums of all ranks."""

    grad: Tensor
    x: Tensor
    stats: Tensor
    totals: Tensor
    weight: Tensor | None
    bias: Tensor | None
    kept: Tensor | None
    act: tuple[str, float]

    def of(self, sums: Tensor) -> Tensor:
        """The gradient, given the sums (2C,) of all ranks."""
        arguments = (self.grad, self.x, self.stats, self.totals, self.weight, sums)
        if self.act[0] == "identity":
            return run(NORMALIZE_BACKWARD, *arguments)
        return run(NORMALIZE_BACKWARD, *arguments, self.bias, self.kept, *self.act)

    @property
    def saved(self) -> list[Tensor]:
        """What it reads that the forward has saved and that others may change."""
        saved = [self.x] if self.weight is None else [self.x, self.weight]
        if self.act[0] != "identity":
            saved += [tensor for tensor in (self.bias, self.kept) if tensor is not None]
        return saved


class GradientOfTwo(NamedTuple):
    """What the gradients of a site and of the earlier one that is added to it follow from.

    Attributes:
        own: of the later site, with the activation of both.
        other: of the earlier one.
        place: where the earlier one is among the sites of the collective.
    """

    own: Gradient
    other: Gradient
    place: int

    def of(self, other_sums: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the earlier site and of the later one."""
        own, other = self.own, self.other
        return run(
            NORMALIZE_TWO_BACKWARD,
            own.grad, other.x, other.stats, other.totals, other.weight, other.bias, other_sums,
            own.x, own.stats, own.totals, own.weight, own.bias, sums, *own.act,
        )  # fmt: skip

    @property
    def saved(self) -> list[Tensor]:
        """As of :class:`Gradient`."""
        # What the activation reads of the one, it reads of the other.
        return [*self.own.saved, *self.other._replace(act=self.own.act).saved]


def input_gradients(
    ones: Sequence[Gradient | GradientOfTwo | None], parts: Sequence[Tensor]
) -> list[Tensor]:
    """The input gradients, given the sums of all ranks; None is part of a later one."""
    found: list[Any] = [None] * len(ones)
    for i, (one, sums) in enumerate(zip(ones, parts, strict=True)):
        if isinstance(one, GradientOfTwo):
            found[one.place], found[i] = one.of(parts[one.place], sums)
        elif one is not None:
            found[i] = one.of(sums)
    return found


def gradient_of(grad: Tensor | None, x: Tensor, *others: Any) -> Gradient:
    """Of a site whose result got the gradient ``grad``, None if nobody has read it."""
    if grad is None:
        grad = torch.zeros_like(x)
    return Gradient(grad.contiguous(memory_format=memory_format(x)), x, *others)


def behind_activation(one: Gradient, more: Tensor) -> Gradient:
    """A site that ends before its activation, whose argument has got the gradient ``more``, too."""
    arguments = (one.grad, one.x, one.stats, one.weight, one.bias, one.kept, *one.act, True)
    _, inner = run(ACTIVATION_BACKWARD_REDUCE, *arguments)
    return one._replace(grad=inner + more, act=IDENTITY)


def reduce(one: Gradient, *, write: bool) -> tuple[Tensor, Gradient]:
    """The sums of a site; ``write``: its gradient is wanted behind the activation, too."""
    if one.act[0] == "identity":
        return run(NORMALIZE_BACKWARD_REDUCE, one.grad, one.x, one.stats), one
    write = write or not site_arguments.prefers_recomputing(one.x)
    arguments = (one.grad, one.x, one.stats, one.weight, one.bias, one.kept, *one.act, write)
    sums, inner = run(ACTIVATION_BACKWARD_REDUCE, *arguments)
    return sums, one._replace(grad=inner, act=IDENTITY) if write else one


def reduce_two(own: Gradient, other: Gradient) -> tuple[Tensor, Tensor]:
    """The sums of ``other`` and of ``own``, whose activation is that of both."""
    return run(
        NORMALIZE_TWO_BACKWARD_REDUCE, own.grad, other.x, other.stats, other.weight, other.bias,
        own.x, own.stats, own.weight, own.bias, *own.act,
    )  # fmt: skip
