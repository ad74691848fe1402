"""The node of autograd that ends the collective of a backward, behind the one that launches it.

_BatchNorm       sums of the gradients -> launch of the collective
...              whatever is ready, above all the slot (see :mod:`bnrewrite.ops.slot`)
_EndCollective   end of the collective -> input gradients
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnrewrite.collectives import end_all_reduce_sum
from bnrewrite.guards import is_ordered_by_compiler, runs_in_python
from bnrewrite.ops import sites as site_arguments
from bnrewrite.ops.hand_over import HandOver, runs
from bnrewrite.ops.input_gradients import input_gradients
from bnrewrite.ops.library import below_autograd
from bnrewrite.ops.sites import TENSORS, Site, split
from bnrewrite.ops.slot import open_slot


def put_behind_end_node(
    tensors: list[Any], sites: Sequence[Site], inside: set[int]
) -> HandOver | None:
    """Puts inputs behind the node that ends the collective of their backward, if they need one.

    That node reads parameters, too, and a hook on their gradients may run an optimizer: those are
    behind it as well, so that nobody has their gradients before.
    """
    wanted = [i for i in range(0, len(tensors), TENSORS) if tensors[i].requires_grad]
    if not wanted:
        return None
    moved = wanted.copy()
    for i in wanted:
        weight, bias = tensors[i + 1], tensors[i + 2]
        if weight is not None and weight.requires_grad:
            moved.append(i + 1)
        # The common case, without a call.
        followed = inside or sites[i // TENSORS].act[0] != "identity"
        if (
            followed
            and bias is not None
            and bias.requires_grad
            and reads_bias(i // TENSORS, sites, inside)
        ):
            moved.append(i + 2)
    between = HandOver([tensors[i].grad_fn for i in wanted])
    behind: Any = _EndCollective.apply(between, *[tensors[i] for i in moved])
    open_slot()
    for i, tensor in zip(moved, behind, strict=True):
        tensors[i] = tensor
    return between


def reads_bias(index: int, sites: Sequence[Site], inside: set[int]) -> bool:
    """Whether the backward computes again what the site ``index`` activated, or a part of that."""
    site = sites[index]
    if site.act[0] == "identity" or not site_arguments.prefers_recomputing(site.input):
        return index in inside
    return site.residual is None and (site.residual_site is None or site.residual_site in inside)


class _EndCollective(torch.autograd.Function):
    """Inputs and parameters themselves; in backward, the end of the collective.

    It makes the gradients of the inputs, which come first, and hands on those of the parameters.
    """

    @staticmethod
    def forward(ctx, between: HandOver, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.between = between
        return tensors

    @staticmethod
    @runs_in_python
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        launched = None if is_ordered_by_compiler() else ctx.between.take()
        if launched is None:
            return None, *grads
        pending, sizes, gradients = launched
        with below_autograd():
            parts = split(end_all_reduce_sum(pending, sum(sizes)), sizes)
            found = input_gradients(gradients, parts)
        # Second derivatives come here by other ways than through the site, too.
        num = len(found)
        sums = (
            one if other is None else one + other
            for one, other in zip(found, grads[:num], strict=True)
        )
        return None, *sums, *grads[num:]


def is_awaited(ctx, between: HandOver) -> bool:
    """Whether the node that ends the collective runs, and for the sake of an input."""
    if None not in between.nodes:
        return any(map(runs, between.nodes))
    # Whether the gradient of a leaf was asked for, torch does not say.
    end = _EndCollective._backward_cls
    return any(runs(node) for node, _ in ctx.next_functions if isinstance(node, end))
