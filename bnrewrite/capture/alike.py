"""Whether two traces came out the same to the last detail."""

import dataclasses
import enum
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import fx

from bnrewrite.passes.base import Attribute

_EQUAL = (
    bool, int, str, bytes, Attribute, torch.dtype, torch.device, torch.layout, torch.memory_format,
    enum.Enum,
)  # fmt: skip
"""Types of values that are the same if they are equal."""

_SPELLED = (float, complex, np.generic)
"""Types of values that are the same if they are spelled alike: zeros have signs."""


def alike(value: Any, other: Any) -> bool:
    """Whether two parts of traces say the same: nodes of graphs, arguments, what was read.

    1, 1.0 and True are not alike. Anything that this does not know is alike itself only.
    """
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, fx.Node):
        return value.name == other.name
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(alike, value, other))
    if isinstance(value, dict):
        return alike([*value.items()], [*other.items()])
    if isinstance(value, (set, frozenset)):
        return set(map(_told, value)) == set(map(_told, other))
    if isinstance(value, (slice, range)):
        return alike((value.start, value.stop, value.step), (other.start, other.stop, other.step))
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("bnrewrite."):
        names = (field.name for field in dataclasses.fields(value) if field.compare)
        return all(alike(getattr(value, name), getattr(other, name)) for name in names)
    if isinstance(value, _SPELLED):
        return repr(value) == repr(other)
    return isinstance(value, _EQUAL) and bool(value == other)


def _told(value: Any) -> tuple[Any, ...]:
    """What tells an element of a set from others that equal it."""
    return type(value), repr(value) if isinstance(value, _SPELLED) else value


def nodes_alike(graph: fx.Graph, other: fx.Graph) -> bool:
    """Whether the code of two graphs is the same."""
    return len(graph.nodes) == len(other.nodes) and all(
        one.op == two.op
        and one.name == two.name
        and alike(one.target, two.target)
        and alike(one.args, two.args)
        and alike(one.kwargs, two.kwargs)
        for one, two in zip(graph.nodes, other.nodes, strict=True)
    )


GENERATED = "<eval_with_key>"
"""How the files are called of code that torch made of graphs."""


def forwards_alike(forward: FunctionType, other: FunctionType) -> bool:
    """Whether torch made two forwards of the same graph: the same code that calls the same."""
    if forward is other:
        return True
    if forward.__code__ != other.__code__ or not forward.__code__.co_filename.startswith(GENERATED):
        return False
    one, two = forward.__globals__, other.__globals__
    names = (one.keys() | two.keys()) - {"__builtins__"}
    return all(name in one and name in two and one[name] is two[name] for name in names)
