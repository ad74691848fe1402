"""Builtins that code asks about values, as the traced code finds them while a trace records.

They stand in the globals of its modules until the conversion ends, in front of the builtins.
"""

import builtins
import operator
import sys
from typing import Any

from torch import nn

from bnrewrite.capture.proxy import PROXIES
from bnrewrite.sites.tracing import tracer_here


def _recorder(value: Any) -> Any:
    """The tracer that records ``value``, a proxy; None for any other value."""
    return value.tracer if type(value) in PROXIES and value.tracer.recording else None


def _has_attribute(value: Any, name: str, /) -> bool:
    tracer = _recorder(value)
    return hasattr(value, name) if tracer is None else tracer.has_attribute(value, name)


def _get_attribute(value: Any, name: str, /, *default: Any) -> Any:
    tracer = _recorder(value)
    if tracer is not None and default:
        tracer.has_attribute(value, name)
    return getattr(value, name, *default)


def _identity(value: Any, /) -> int:
    tracer = _recorder(value)
    if tracer is not None:
        tracer.refuse("asks for the id of a computed value")
    return id(value)


def _is_callable(value: Any, /) -> bool:
    tracer = _recorder(value)
    if tracer is not None:
        tracer.refuse("asks whether a computed value is callable")
    return callable(value)


def _length(value: Any, /) -> Any:
    tracer = _recorder(value)
    return len(value) if tracer is None else tracer.create_proxy("call_function", len, (value,), {})


def _directory(*values: Any) -> list[str]:
    tracer = _recorder(values[0]) if values else None
    if tracer is not None:
        tracer.refuse("asks for the attributes of a computed value")
    # Without a value it means the names of the code that asks.
    return dir(*values) if values else sorted(sys._getframe(1).f_locals)


_prints = print


def _print(*args: Any, **kwargs: Any) -> None:
    tracer = tracer_here()
    if tracer is not None and tracer.recording:
        tracer.refuse("prints")
    _prints(*args, **kwargs)


class _TypeOfTypes(type):
    """Has ``type(value)`` ask, and everything else be as with ``type``."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            tracer = _recorder(args[0])
            if tracer is not None:
                tracer.refuse("asks for the type of a computed value")
            tracer = tracer_here() if issubclass(type(args[0]), nn.Module) else None
            if tracer is not None and tracer.recording:
                return tracer.class_of(args[0], sys._getframe(1))
        return type(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)


class _Type(type, metaclass=_TypeOfTypes):
    """Stands for ``type``."""


QUESTIONS: dict[str, Any] = {
    "hasattr": _has_attribute,
    "getattr": _get_attribute,
    "id": _identity,
    "callable": _is_callable,
    "dir": _directory,
    "len": _length,
    "print": _print,
    "type": _Type,
}
"""By the names of the builtins that they stand for."""

IDENTITY = frozenset(("is_", "is_not", "is_none", "is_not_none"))
"""Functions of ``operator`` that compare by identity, and tell nobody."""

_OURS = frozenset(map(id, QUESTIONS.values()))

_UNSEEN = frozenset(
    id(vars(home)[name])
    for home, names in ((builtins, QUESTIONS), (operator, IDENTITY))
    for name in names
    # A proxy has no length to give.
    if name in vars(home) and name != "len"
)


def is_question(value: Any) -> bool:
    """Whether ``value`` is one of :data:`QUESTIONS`, and no name of the user's."""
    return id(value) in _OURS


def asks_unseen(value: Any) -> bool:
    """Whether ``value`` is a function that asks about values and tells nobody."""
    return id(value) in _UNSEEN
