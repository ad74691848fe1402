"""Code that no trace can follow: what it does leaves no sign for a tracer to see."""

import builtins
import operator
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from bnrewrite.capture.bytecode import decisions
from bnrewrite.capture.outside import TRACING
from bnrewrite.capture.questions import IDENTITY

_AMBIENT = frozenset(("time", "datetime", "uuid", "secrets", "_contextvars", "contextvars"))
"""Modules whose answers differ from call to call."""

_BY_NAME = frozenset(("globals", "eval", "exec"))
"""Builtins that find what code does not name."""


def unfollowed(
    function: FunctionType, names: frozenset[str], found: frozenset[str]
) -> Iterator[str]:
    """Why a trace may not follow the code of ``function``; nothing if it may.

    Args:
        function: whose code is about to run.
        names: all that its code uses, the functions inside it included.
        found: those of globals and builtins.
    """
    decided = decisions(function.__code__)
    if decided is not None and decided.matches:
        yield "uses a match statement"
    if not found.isdisjoint(_BY_NAME):
        yield "looks up names dynamically"
    passes = "__getattribute__" in names and "object" in found and not _is_getter(function)
    if passes or "getattr_static" in names:
        yield "reads attributes past the class of an object"
    for name in names & TRACING:
        yield f"calls {name}()"


def unfollowed_value(value: Any, names: frozenset[str]) -> Iterator[str]:
    """Why a trace may not follow code with these ``names``, of which one stands for ``value``."""
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    if home in _AMBIENT or value is builtins:
        yield f"uses the module {home}"
    if value is operator and not names.isdisjoint(IDENTITY):
        yield "compares values with functions of operator"


def _is_getter(function: FunctionType) -> bool:
    """Whether a function is how objects of a class are asked for attributes."""
    return function.__name__ in ("__getattribute__", "__getattr__")
