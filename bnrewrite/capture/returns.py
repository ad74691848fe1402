"""What modules return, as far as their class or their code says so."""

import bisect
import dis
import inspect
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from bnrewrite.capture.assumptions import Assumptions
from bnrewrite.capture.bytecode import JUMPS, instructions_of, start_of
from bnrewrite.sites.classes import original_class

_DEPTH = 6
"""How many calls inside calls are followed."""

_MAKES = ("BINARY_", "UNARY_", "BUILD_", "COMPARE_", "FORMAT_")
"""Instructions whose results are never None."""

_HOLDERS = (nn.MultiheadAttention, nn.ModuleList, nn.ModuleDict)
"""Modules of torch that return None, or whose members are called."""


def never_returns_none(
    module: nn.Module, path: str, read: Assumptions, depth: int = _DEPTH
) -> bool:
    """Whether calling ``module`` gives something whatever it is given; False if nobody knows.

    Args:
        module: the module, whose code and that of its children is looked at.
        path: of the module below the owner.
        read: notes what that depends on.
        depth: how many calls inside it are followed.
    """
    cls = original_class(module)
    read.layers[path] = cls
    if "forward" in module.__dict__ or cls.__call__ is not nn.Module.__call__:
        return False
    read.methods[path, "forward"] = cls.forward
    if cls.forward is nn.Sequential.forward:
        names = read.children[path] = tuple(module._modules)
        last = module._modules[names[-1]] if names else None
        return last is not None and never_returns_none(last, f"{path}.{names[-1]}", read, depth)
    if cls.__module__.startswith("torch.nn.modules."):
        return cls not in _HOLDERS
    forward = inspect.unwrap(cls.forward, stop=_is_users)
    if not isinstance(forward, FunctionType) or depth == 0:
        return False
    return _Code(module, path, forward, read, depth).never_returns_none()


def _is_users(function: Any) -> bool:
    """Whether a wrapper may return something else than what it is around, as those of torch do."""
    return not str(getattr(function, "__globals__", {}).get("__name__")).startswith("torch.")


class _Code:
    """The code of a method of a module."""

    def __init__(
        self, module: nn.Module, path: str, function: FunctionType, read: Assumptions, depth: int
    ) -> None:
        self._module = module
        self._path = path
        self._globals = function.__globals__
        self._read = read
        self._depth = depth
        code: CodeType = function.__code__
        self._instructions = instructions_of(code)
        self._arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        self._open: set[str] = set()
        starts = [one.offset for one in self._instructions]
        self._jumps = [
            (index, bisect.bisect_left(starts, one.argval))
            for index, one in enumerate(self._instructions)
            if one.opcode in JUMPS
        ]

    def never_returns_none(self) -> bool:
        """Whether each value that it returns is one."""
        returned = [i for i, one in enumerate(self._instructions) if one.opname == "RETURN_VALUE"]
        constants = [one for one in self._instructions if one.opname == "RETURN_CONST"]
        return all(one.argval is not None for one in constants) and all(
            map(self._takes_value, returned)
        )

    def _takes_value(self, index: int) -> bool:
        """Whether the instruction takes something else than None, wherever it is come to from."""
        sources = [source for source, target in self._jumps if target == index]
        return all(
            self._instructions[source].opname in ("JUMP_FORWARD", "JUMP_ABSOLUTE")
            and self._takes_value(source)
            for source in sources
        ) and self._is_value(index - 1)

    def _is_value(self, index: int) -> bool:
        """Whether the instruction leaves something else than None."""
        one = self._instructions[index]
        if one.opname == "BINARY_SUBSCR" or one.argrepr == "[]":
            return False
        if one.opname.startswith(_MAKES):
            return True
        if one.opname == "LOAD_CONST":
            return one.argval is not None
        if one.opname.startswith("LOAD_FAST"):
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
        return known and all(map(self._takes_value, stores))

    def _is_call(self, index: int) -> bool:
        """Whether a call gives a value: of a child, of torch, of a method of tensors."""
        names = []
        start = start_of(self._instructions, index)
        arguments = start
        for one in self._instructions[start:index]:
            if one.opname in ("PUSH_NULL", "LOAD_METHOD", "LOAD_ATTR") or not names:
                names += [] if one.opname == "PUSH_NULL" else [one]
                arguments += 1
            else:
                break
        depth = 0
        for one in self._instructions[arguments:index]:
            depth += dis.stack_effect(one.opcode, one.arg, jump=False)
            if depth < 0:
                # That was a call of its own, and what it gave is called, or has a method that is.
                return False
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
            return self._gives_own(attributes)
        # What is not found elsewhere is a method of a value.
        return bool(attributes) and hasattr(Tensor, attributes[-1])

    def _gives_own(self, attributes: list[str]) -> bool:
        """Whether a call of what the module has under a path gives a value."""
        holder: Any = self._module
        path = self._path
        *outer, name = attributes
        for one in outer:
            holder = holder._modules.get(one) if isinstance(holder, nn.Module) else None
            path = f"{path}.{one}"
        if not isinstance(holder, nn.Module):
            return False
        if name in holder.__dict__:
            if holder.__dict__[name] is None:
                # It is not called then.
                self._read.constants[path, name] = None
            return holder.__dict__[name] is None
        if name in holder._modules:
            called = holder._modules[name]
            if called is None:
                self._read.absent.add((path, name))
                return True
            return never_returns_none(called, f"{path}.{name}", self._read, self._depth - 1)
        function = getattr(original_class(holder), name, None)
        if isinstance(function, FunctionType) and self._depth and not outer:
            self._read.methods[path, name] = function
            made = _Code(holder, path, function, self._read, self._depth - 1)
            return made.never_returns_none()
        return False
