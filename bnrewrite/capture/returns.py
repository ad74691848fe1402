"""Which modules never return None, as far as their code says so."""

import dis
import functools
import inspect
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from bnrewrite.capture.bytecode import instructions_of, start_of
from bnrewrite.sites.classes import original_class

_DEPTH = 6
"""How many calls inside calls are followed."""

_MAKES = ("BINARY_", "UNARY_", "BUILD_", "COMPARE_", "FORMAT_")
"""Instructions whose results are never None."""


def never_returns_none(module: nn.Module, depth: int = _DEPTH) -> bool:
    """Whether calling ``module`` gives something whatever it is given; False if nobody knows."""
    cls = original_class(module)
    if cls is nn.Sequential:
        return bool(len(module)) and never_returns_none(list(module)[-1], depth)  # pyright: ignore
    if cls.__module__.startswith("torch.nn.modules."):
        return cls is not nn.MultiheadAttention
    forward = inspect.unwrap(cls.forward)
    if not isinstance(forward, FunctionType) or depth == 0:
        return False
    return _Code(module, forward, depth).never_returns_none()


class _Code:
    """The code of a method of a module."""

    def __init__(self, module: nn.Module, function: FunctionType, depth: int) -> None:
        self._module = module
        self._globals = function.__globals__
        self._depth = depth
        self._instructions = instructions_of(function.__code__)
        code: CodeType = function.__code__
        self._arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        self._open: set[str] = set()

    def never_returns_none(self) -> bool:
        """Whether each value that it returns is one."""
        returned = [i for i, one in enumerate(self._instructions) if one.opname == "RETURN_VALUE"]
        constants = [one for one in self._instructions if one.opname == "RETURN_CONST"]
        return all(one.argval is not None for one in constants) and all(
            self._is_value(index - 1) for index in returned
        )

    def _is_value(self, index: int) -> bool:
        """Whether the instruction leaves something else than None."""
        one = self._instructions[index]
        if one.opname == "BINARY_SUBSCR":
            return False
        if one.opname.startswith(_MAKES):
            return True
        if one.opname == "LOAD_CONST":
            return one.argval is not None
        if one.opname.startswith("LOAD_FAST") and isinstance(one.argval, str):
            return self._is_variable(one.argval)
        return one.opname.startswith("CALL") and self._is_call(index)

    def _is_variable(self, name: str) -> bool:
        if name in self._open:
            return True
        self._open.add(name)
        stores = [
            index
            for index, one in enumerate(self._instructions)
            if one.opname.startswith("STORE_FAST") and one.argval == name
        ]
        # An argument that is handed on is asked about where it is made.
        known = bool(stores) or name in self._arguments
        return known and all(self._is_value(index - 1) for index in stores)

    def _is_call(self, index: int) -> bool:
        """Whether a call gives a value: of a child, of torch, of a method of tensors."""
        names = []
        start = start_of(self._instructions, index)
        for one in self._instructions[start:index]:
            if one.opname in ("PUSH_NULL", "LOAD_METHOD", "LOAD_ATTR") or not names:
                names += [] if one.opname == "PUSH_NULL" else [one]
            else:
                break
        if not names:
            return False
        first, *attributes = names
        return self._gives_value(first, [str(one.argval) for one in attributes])

    def _gives_value(self, first: dis.Instruction, attributes: list[str]) -> bool:
        if first.opname.startswith("LOAD_GLOBAL"):
            value = self._globals.get(str(first.argval))
            for name in attributes:
                value = getattr(value, name, None) if isinstance(value, ModuleType) else None
            return str(getattr(value, "__module__", "")).startswith("torch")
        if first.opname.startswith("LOAD_FAST") and first.argval == "self" and attributes:
            try:
                called: Any = functools.reduce(_member, attributes, self._module)
            except (AttributeError, KeyError, TypeError):
                return False
            if called is None:
                # It is not called then.
                return True
            if isinstance(called, nn.Module):
                return never_returns_none(called, self._depth - 1)
            function = getattr(called, "__func__", None)
            if isinstance(function, FunctionType) and self._depth and len(attributes) == 1:
                return _Code(self._module, function, self._depth - 1).never_returns_none()
            return False
        # What is not found elsewhere is a method of a value.
        return bool(attributes) and hasattr(Tensor, attributes[-1])


def _member(holder: Any, name: str) -> Any:
    if isinstance(holder, nn.Module) and name in holder._modules:
        return holder._modules[name]
    return getattr(holder, name)
