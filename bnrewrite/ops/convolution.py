"""A convolution whose weight gradient is computed while a collective is under way.

Torch computes both gradients of a convolution in one node of autograd. The input gradient is what
the site before the convolution waits for; the weight gradient nobody waits for. Here they are two
nodes, of which the second goes into the slot of that site (see :mod:`bnrewrite.ops.slot`):

    convolution   input gradient -> (activation) -> sums of the site, launch of its collective
    the slot      weight and bias gradient
    the site      end of the collective, input gradient

Both halves are the calls of ATen that torch makes, so all gradients are the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bnrewrite.guards import is_ordered_by_compiler, runs_in_python
from bnrewrite.ops.hand_over import HandOver, runs
from bnrewrite.ops.slot import move_to_slot

_backward = torch.ops.aten.convolution_backward.default


class Geometry(NamedTuple):
    """Arguments of ``torch.convolution`` besides its tensors, in order."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``torch.convolution``, with gradients in two nodes.

    Args:
        x: (N, C_in, *), a gradient of which is wanted.
        weight: (C_out, C_in / groups, *), a gradient of which is wanted, in the dtype of ``x``.
        bias: (C_out,), or None.
        geometry: of the convolution.

    Returns:
        (N, C_out, *), as torch's own.
    """
    between = HandOver()
    tensors = (weight,) if bias is None else (weight, bias)
    edges = _LateGradients.apply(between, *tensors)
    return _Convolution.apply(geometry, between, tensors, x, *edges)  # pyright: ignore


class _LateGradients(torch.autograd.Function):
    """Weight and bias themselves; in backward, their gradients."""

    @staticmethod
    def forward(ctx, between: HandOver, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.between = between
        move_to_slot(ctx)
        return parameters

    @staticmethod
    @runs_in_python
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = None if is_ordered_by_compiler() else ctx.between.take()
        if arguments is None:
            # With create_graph, and for a compiler, they are complete already.
            return None, *grads
        found = _backward(*arguments, [False, *ctx.needs_input_grad[1:], False][:3])[1:]
        # Second derivatives come here by other ways than through the convolution, too.
        sums = (
            one if other is None else one + other for one, other in zip(found, grads, strict=False)
        )
        return None, *sums


class _Convolution(torch.autograd.Function):
    """The convolution; in backward, its input gradient.

    It computes with the parameters themselves, which their owner may fill with other memory until
    the backward comes, and reads nothing of the edges, which only say where gradients go.
    """

    @staticmethod
    def forward(ctx, geometry, between, parameters, x, *edges):
        weight = parameters[0]
        bias = parameters[1] if len(parameters) > 1 else None
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.bias_sizes = None if bias is None else [bias.size(0)]
        ctx.geometry = geometry
        ctx.between = between
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    @runs_in_python
    def backward(ctx, grad):
        num_edges = len(ctx.needs_input_grad) - 4
        if grad is None:
            return None, None, None, None, *[None] * num_edges
        x, weight = ctx.saved_tensors
        arguments = (grad, x, weight, ctx.bias_sizes, *ctx.geometry)
        if is_ordered_by_compiler():
            found = _backward(*arguments, [True, *ctx.needs_input_grad[4:], False][:3])
            return None, None, None, *found[: 1 + num_edges]
        input_node, late_node = (ctx.next_functions[index][0] for index in (0, 1))
        # A leaf's node cannot be asked.
        needs_input = hasattr(input_node, "variable") or runs(input_node)
        needs_late = runs(late_node)
        if needs_late and torch.is_grad_enabled():
            found = _backward(*arguments, [needs_input, *ctx.needs_input_grad[4:], False][:3])
            return None, None, None, *found[: 1 + num_edges]
        grad_x = _backward(*arguments, [True, False, False])[0] if needs_input else None
        if needs_late:
            ctx.between.leave(arguments, [x, weight])
        return None, None, None, grad_x, *[None] * num_edges
