"""Elements of arguments: a trace takes those that it asks about for tensors, and calls must agree.

def forward(self, features):            elements: ("features", (slice(1, None), 0))
    features = features[1:]
    self.block(features[0])             asks inside whether it is None
"""

import operator
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, fx

_CONTAINERS = (list, tuple, dict, OrderedDict)


class Element(NamedTuple):
    """Where an element lies.

    Attributes:
        argument: name of the placeholder.
        indices: what it is indexed with, one after the other: slices, then an integer or string.
    """

    argument: str
    indices: tuple[Any, ...]


def element_of(node: fx.Node) -> Element | None:
    """Where a call finds what ``node`` computes; None if it is no element of an argument.

    Nor is it where something else than an index may have changed what contains it.
    """
    indices: list[Any] = []
    at: Any = node
    while _is_index(at) and (not indices or isinstance(at.args[1], slice)):
        indices.append(at.args[1])
        at = at.args[0]
        if not all(map(_is_index, at.users)):
            return None
    if not indices or isinstance(indices[0], slice) or at.op != "placeholder":
        return None
    return Element(str(at.target), tuple(reversed(indices)))


def _is_index(node: fx.Node) -> bool:
    """Whether ``node`` indexes with what is known."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    index = node.args[1]
    parts = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    return all(part is None or type(part) in (int, str) for part in parts)


def are_tensors(elements: Iterable[Element], arguments: dict[str, Any]) -> bool:
    """Whether a call with ``arguments`` has tensors where the trace took elements for some."""
    return all(_is_tensor(arguments[argument], indices) for argument, indices in elements)


def _is_tensor(value: Any, indices: tuple[Any, ...]) -> bool:
    for index in indices:
        if isinstance(value, Tensor):
            # As its parts are.
            return True
        if type(value) not in _CONTAINERS:
            return False
        try:
            value = value[index]
        except (IndexError, KeyError, TypeError):
            return False
    return isinstance(value, Tensor)
