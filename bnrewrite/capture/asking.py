"""Which forwards ask for the class of a module by ``type(module)`` or ``module.__class__``.

Conversion changes it. A graph has the branch that the class from before takes; a forward that asks
and runs as it is may take the other one.
"""

import inspect
import weakref
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from bnrewrite.capture.bytecode import is_used_as_value, type_questions
from bnrewrite.capture.candidates import Holders, code_names, has_forward, helpers
from bnrewrite.capture.values import is_library, parts, routines
from bnrewrite.sites.classes import below, is_converted, original_class

_DEPTH = 3
"""How many calls from a forward code may be away."""


def asking_candidates(
    modules: dict[str, nn.Module], owners: Collection[str]
) -> dict[str, nn.Module]:
    """Those of a model's ``modules`` that hold sites or ``owners``, and may ask for classes."""
    above = Holders(modules).above(
        name for name, module in modules.items() if name in owners or is_converted(module)
    )
    return {
        name: module
        for name, module in modules.items()
        if name in above and has_forward(module) and may_ask(module)
    }


def may_ask(module: nn.Module) -> bool:
    """Whether the forward of ``module`` may compare classes that it asks for."""
    return bool(_asking(original_class(module)))


def unanswered(module: nn.Module, asked: dict[str, str]) -> tuple[str, str] | None:
    """A converted module below whose class the forward of ``module`` compares as it runs.

    Args:
        module: whose own forward runs.
        asked: what a trace saw of it, up to where it ended; after that, code tells which names
            classes of converted modules and asks for classes.

    Returns:
        Its path, and file and line of the question.
    """
    for path, place in asked.items():
        if is_converted(below(module, path)):
            return path, place
    for function in _asking(original_class(module)):
        question = asks_for_named(function, module)
        if question is not None:
            return question
    return None


def asks_for_named(function: FunctionType, module: nn.Module) -> tuple[str, str] | None:
    """A converted module below ``module`` whose class ``function`` names, if it asks for classes.

    Returns:
        Its path, and file and line of the question.
    """
    line = next(_lines(function.__code__), None)
    if line is None:
        return None
    named = set(_named(function, module))
    for path, child in module.named_modules():
        if path and is_converted(child) and original_class(child) in named:
            return path, f"{function.__code__.co_filename}:{line}"
    return None


_ASKING: "weakref.WeakKeyDictionary[type, list[weakref.ref[FunctionType]]]"
_ASKING = weakref.WeakKeyDictionary()


def _asking(cls: type[nn.Module]) -> list[FunctionType]:
    """Functions that the forward of a class may call and that ask."""
    if cls not in _ASKING:
        found: list[FunctionType] = []
        _search(cls.forward, cls, _DEPTH, {}, found)
        # A method may know its class.
        _ASKING[cls] = [weakref.ref(function) for function in found]
    return [function for one in _ASKING[cls] if (function := one()) is not None]


def _search(
    value: Any, cls: type, depth: int, seen: dict[CodeType, int], found: list[FunctionType]
) -> None:
    for function in routines(value):
        if not isinstance(function, FunctionType) or is_library(function.__module__):
            continue
        code = function.__code__
        if seen.get(code, -1) >= depth:
            continue
        seen[code] = depth
        names = code_names(code)
        if function not in found and next(_lines(code), None) is not None:
            found.append(function)
        if depth:
            for helper in helpers(function, names):
                _search(helper, cls, depth - 1, seen, found)
            for name in names:
                _search(inspect.getattr_static(cls, name, None), cls, depth - 1, seen, found)


def _lines(code: CodeType) -> Iterator[int]:
    """Lines of code, and of that inside it, that ask for a class and may compare it."""
    for one in type_questions(code):
        if not (one.of_self or one.for_attribute):
            yield one.line
    if "type" in code.co_names and is_used_as_value(code, "type"):
        yield code.co_firstlineno
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _lines(constant)


def _named(function: FunctionType, module: nn.Module) -> Iterator[type]:
    """Classes that the code of ``function`` names, also in containers."""
    names = code_names(function.__code__)
    values = [*helpers(function, names), *(function.__defaults__ or ())]
    values += [inspect.getattr_static(module, name, None) for name in names]
    homes = {id(function.__globals__): function.__globals__}
    left = [*homes.values()]
    while left:
        home = left.pop()
        found = [home[name] for name in names & home.keys()]
        values += found
        for one in found:
            if isinstance(one, ModuleType) and id(vars(one)) not in homes:
                homes[id(vars(one))] = vars(one)
                left.append(vars(one))
    for value in values:
        yield from _classes(value, 2)


def _classes(value: Any, depth: int) -> Iterator[type]:
    if isinstance(value, type):
        yield value
    elif depth:
        for part in (one for some in parts(value) for one in some):
            yield from _classes(part, depth - 1)
