"""Calls of ``F.batch_norm`` that normalize each sample by itself, which are no BatchNorm.

    F.batch_norm(x.reshape(1, N * C, H, W), None, None, weight.repeat(N), ...)       instance norm
    F.batch_norm(x.flatten(1)[None], None, None, training=True)                      layer norm

The batch is among the channels, so there is nothing to share: other ranks hold other samples there.
A call counts as such where it says so: its input is given a first dimension of one, its channels
are counted by the size of a batch or by what is left (-1), and no vector of the module, whose
length is the number of channels, goes with it.
"""

import math
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

EACH_SAMPLE = "it normalizes each sample by itself, so ranks have nothing to share"
"""Reason of the skip."""

_THROUGH = ("contiguous", "clone", "detach", "float", "double", "half", "bfloat16", "to", "type_as")
"""Methods that keep the shape."""

_RESHAPES = ("reshape", "view", torch.reshape)

_ARITHMETIC = (operator.mul.__module__, math.__name__)
"""Modules of the functions by which sizes follow from others."""


def is_of_each_sample(
    input: Any, vectors: Collection[Any], activations: Collection[fx.Node]
) -> bool:
    """Whether a call normalizes each sample by itself.

    Args:
        input: of the call.
        vectors: its weight, bias and running statistics.
        activations: nodes that depend on the arguments of the forward.
    """
    if any(isinstance(one, fx.Node) and one.op == "get_attr" for one in vectors):
        return False
    node = _past(input)
    sizes = _sizes(node)
    if sizes is not None:
        return len(sizes) > 1 and sizes[0] == 1 and _counts_samples(sizes[1], activations)
    inner = _without_first_dimension(node)
    if inner is None:
        return False
    if _is_call(inner, "flatten", torch.flatten):
        return _argument(inner, 1, "start_dim", 0) in (0, 1)
    sizes = _sizes(inner)
    return bool(sizes) and _counts_samples(sizes[0], activations)


def _past(value: Any) -> Any:
    """The value of the same shape that ``value`` was made of."""
    while isinstance(value, fx.Node) and value.op == "call_method" and value.target in _THROUGH:
        value = value.args[0]
    return value


def _is_call(node: Any, *targets: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op in ("call_method", "call_function")
        and node.target in targets
    )


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def _sizes(node: Any) -> list[Any] | None:
    """The sizes that a tensor is reshaped to; None if it is made in another way."""
    if not _is_call(node, *_RESHAPES):
        return None
    sizes = node.args[1:] or tuple(node.kwargs.values())
    return list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)


def _without_first_dimension(node: Any) -> Any:
    """The tensor that a first dimension of one was added to; None if it is made in another way."""
    if _is_call(node, "unsqueeze", torch.unsqueeze):
        return _past(node.args[0]) if _argument(node, 1, "dim", None) == 0 else None
    if _is_call(node, operator.getitem):
        index = node.args[1]
        first = index[0] if isinstance(index, tuple) and index else index
        return _past(node.args[0]) if first is None else None
    return None


def _counts_samples(size: Any, activations: Collection[fx.Node]) -> bool:
    """Whether a size is what is left, or follows from the first size of an activation."""
    if not isinstance(size, fx.Node):
        return size == -1
    if size not in activations:
        return False
    if _is_call(size, "size"):
        return _argument(size, 1, "dim", None) == 0
    if _is_call(size, operator.getitem) and _is_shape(size.args[0]):
        index: Any = size.args[1]
        return not index.start if isinstance(index, slice) else index == 0
    is_number = getattr(size.target, "__module__", "") in _ARITHMETIC
    return is_number and any(_counts_samples(one, activations) for one in size.all_input_nodes)


def _is_shape(node: Any) -> bool:
    if _is_call(node, "size"):
        return len(node.args) == 1 and not node.kwargs
    return _is_call(node, getattr) and node.args[1] == "shape"
