"""What calls in a graph write in place."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnrewrite.passes.torch_calls import name_of

_IN_PLACE_OPERATORS = frozenset((
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior",
    "ixor", "ilshift", "irshift", "setitem", "delitem",
))  # fmt: skip

_CONTAINER_METHODS = frozenset((
    "append", "extend", "insert", "pop", "popitem", "update", "clear", "remove", "setdefault",
    "sort", "reverse",
))  # fmt: skip

_KNOWN_HOMES = (
    "builtins", "math", "torch", "torch.functional", "torch.nn.functional", "torch._tensor",
    "torch._jit_internal", "torch._refs",
)  # fmt: skip

_EFFECTS = frozenset(("print", "setattr", "delattr", "next", "exec", "eval"))


def written_arguments(node: fx.Node) -> list[Any] | None:
    """Arguments that a function or method writes in place; None if nobody knows."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = name_of(node)
    if node.op == "call_method":
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name in _CONTAINER_METHODS:
            return [node.args[0]]
        return [node.kwargs["out"]] if "out" in node.kwargs else []
    function: Any = node.target
    if isinstance(function, torch._ops.OpOverload):
        return _written_by_schema(function, node)
    home = getattr(function, "__module__", None) or type(function).__module__
    if home in ("_operator", "operator"):
        return [node.args[0]] if name in _IN_PLACE_OPERATORS else []
    if (home not in _KNOWN_HOMES and not home.startswith("torch._C")) or name in _EFFECTS:
        return None
    written = [node.args[0]] if name.endswith("_") and not name.endswith("__") else []
    if "out" in node.kwargs:
        written.append(node.kwargs["out"])
    if _in_place_flag(function, node) and node.args:
        written.append(node.args[0])
    elif _in_place_flag(function, node):
        written.extend(node.all_input_nodes)
    return written


def _in_place_flag(function: Callable[..., Any], node: fx.Node) -> bool:
    """Whether an argument called ``inplace`` is anything but False."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    position = _position_of_inplace(function)
    return position is not None and any(
        value is not False for value in node.args[position : position + 1]
    )


@functools.lru_cache(maxsize=256)
def _position_of_inplace(function: Callable[..., Any]) -> int | None:
    """Which argument of ``function`` is called ``inplace``; None if none is known to be."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _written_by_schema(function: torch._ops.OpOverload, node: fx.Node) -> list[Any]:
    written = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            written.extend(value if isinstance(value, (list, tuple)) else [value])
    return written
