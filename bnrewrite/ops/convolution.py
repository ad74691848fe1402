"""A convolution whose weight gradient is computed while a collective is under way.

Torch computes both gradients of a convolution in one node of autograd. The input gradient is what
the site before the convolution waits for; the weight gradient nobody waits for. Here they are two
nodes, of which the second goes into the slot of that site (see :mod:`bnrewrite.ops.slot`):

    convolution   input gradient -> (activation) -> sums of the site, launch of its collective
    the slot      weight and bias gradient
    the site      end of the collective, input gradient

Both halves are the calls of ATen that torch makes, so all gradients are the same bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    held = _Held()
    tensors = (weight,) if bias is None else (weight, bias)
    edges = _HeldGradients.apply(held, *tensors)
    return _Convolution.apply(geometry, held, tensors, x, *edges)  # pyright: ignore


class _Held:
    """What a weight gradient needs, between the two nodes, for each backward that runs."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, ...]] = {}

    def keep(self, *values: Any) -> None:
        self._kept[torch._C._current_graph_task_id()] = values

    def take(self) -> tuple[Any, ...] | None:
        return self._kept.pop(torch._C._current_graph_task_id(), None)


class _HeldGradients(torch.autograd.Function):
    """Weight and bias themselves; in backward, their gradients."""

    @staticmethod
    def forward(ctx, held: _Held, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.held = held
        move_to_slot(ctx)
        return parameters

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = None if torch.compiler.is_compiling() else ctx.held.take()
        if kept is None:
            # With create_graph, and for a compiler, they are complete already.
            return None, *grads
        mask = [False, *ctx.needs_input_grad[1:], *([False] if len(grads) == 1 else [])]
        found = _backward(*kept, mask)[1:]
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
    def forward(ctx, geometry, held, parameters, x, *edges):
        weight = parameters[0]
        bias = parameters[1] if len(parameters) > 1 else None
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else [bias.size(0)]
        ctx.geometry = geometry
        ctx.held = held
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        arguments = (grad, x, weight, ctx.bias_sizes, *ctx.geometry)
        needs = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            found = _backward(*arguments, [True, *needs, False][:3])
            return None, None, None, *found[: 1 + len(needs)]
        grad_x = _backward(*arguments, [True, False, False])[0]
        ctx.held.keep(*arguments)
        return None, None, None, grad_x, *(None for _ in needs)
