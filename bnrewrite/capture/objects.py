"""Has objects tell which of their attributes traced code reads.

How a configuration of OmegaConf, pydantic or transformers finds an attribute is code of its
package, with caches, locks and validators that no trace can follow. What it finds is a value, which
is compared at every call like any other. So that code is left alone, and in turn traced code may do
nothing with a configuration but read attributes: no trace would know what came of it.
"""

import contextlib
import threading
from collections.abc import Callable
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

from bnrewrite.capture.unreadable import is_fixed
from bnrewrite.capture.values import MISSING, is_configuration, is_library

_SPEAKS_OF_CLASSES = frozenset((
    "__getattribute__", "__getattr__", "__init__", "__new__", "__del__", "__init_subclass__",
    "__class_getitem__", "__set_name__",
))  # fmt: skip
"""Special methods that say nothing of what an object holds, or that are asked for attributes."""

_COPIES = "copies an object that it keeps"
_DOES_MORE = "does more than read attributes of a configuration"


class Objects:
    """Classes whose objects tell, for one trace, what is read of them.

    Args:
        tracer: that records; it is asked to refuse what a graph could not stand for.
        known: values that traced code may look into, by identity.
        see_getter: is told of a class and a name before an attribute is read.
        note: is told of the object, the name and what was found, or MISSING.

    Attributes:
        classes: the classes.
    """

    def __init__(
        self,
        tracer: Any,
        known: dict[int, Any],
        see_getter: Callable[[type, str], None],
        note: Callable[[Any, str, Any], None],
    ) -> None:
        self.classes: set[type] = set()
        self._tracer = tracer
        self._known = known
        self._see_getter = see_getter
        self._note = note
        self._restore = contextlib.ExitStack()
        # Whether a configuration is looking for an attribute.
        self._finding = False

    def __enter__(self) -> None:
        self._restore.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._restore.__exit__(*error)

    def watch(self, cls: type) -> None:
        """Has objects of ``cls`` tell, until the end of the trace."""
        self.classes.add(cls)
        look_up = getattr(cls, "__getattr__", None)
        told = self._replace(cls, "__getattribute__", self._telling(cls.__getattribute__, look_up))
        if not told and not is_fixed(cls):
            self._tracer.refuse(f"reads an object whose class cannot change, a {cls.__name__}")
        # To be copied or pickled an object is not asked for its attributes.
        self._replace(cls, "__reduce_ex__", self._refusing(cls.__reduce_ex__, _COPIES))
        if not is_configuration(cls):
            return
        for base in cls.__mro__:
            for name, method in list(vars(base).items()):
                if (
                    isinstance(method, FunctionType)
                    and name.startswith("__")
                    and name.endswith("__")
                    and name not in _SPEAKS_OF_CLASSES
                    and getattr(cls, name) is method
                ):
                    self._replace(cls, name, self._refusing(method, _DOES_MORE))

    def _replace(self, cls: type, name: str, new: Any) -> bool:
        """Puts ``new`` in place of a method until the end of the trace; whether it could be."""
        own = vars(cls).get(name, MISSING)
        try:
            setattr(cls, name, new)
        except (TypeError, AttributeError):
            # A class in C, or a metaclass that forbids it.
            return False
        if own is MISSING:
            self._restore.callback(delattr, cls, name)
        else:
            self._restore.callback(setattr, cls, name, own)
        return True

    def _is_told(self, value: Any) -> bool:
        """Whether it is traced code that does something with ``value``."""
        return (
            self._tracer.recording
            and not self._finding
            and self._tracer.thread == threading.get_ident()
            and id(value) in self._known
        )

    def _telling(self, read: Any, look_up: Any) -> Callable[[Any, str], Any]:
        """``__getattribute__`` of a class that reads so, or by its ``__getattr__``."""

        def find(value: Any, name: str) -> Any:
            try:
                return read(value, name)
            except AttributeError:
                if look_up is None:
                    raise
                return look_up(value, name)

        def getattribute(value: Any, name: str) -> Any:
            if (name.startswith("__") and name != "__dict__") or not self._is_told(value):
                return read(value, name)
            cls = type(value)
            self._see_getter(cls, name)
            configures = is_configuration(cls)
            self._finding = configures and _is_found_by_library(cls, name)
            try:
                found = find(value, name)
            except AttributeError:
                self._note(value, name, MISSING)
                raise
            finally:
                self._finding = False
            if configures and (name == "__dict__" or _is_method_of(found, value)):
                self._refuse(value, _DOES_MORE)
            self._note(value, name, found)
            return found

        return getattribute

    def _refusing(self, method: Callable[..., Any], what: str) -> Callable[..., Any]:
        def operate(value: Any, *args: Any, **kwargs: Any) -> Any:
            if self._is_told(value):
                self._refuse(value, what)
            return method(value, *args, **kwargs)

        return operate

    def _refuse(self, value: Any, what: str) -> None:
        self._tracer.refuse(f"{what}, a {type(value).__name__}")


def _is_found_by_library(cls: type, name: str) -> bool:
    """Whether code of a library alone finds the attribute ``name`` of objects of ``cls``."""
    return not any(name in vars(base) for base in cls.__mro__ if not is_library(base.__module__))


def _is_method_of(found: Any, value: Any) -> bool:
    """Whether ``found`` is a method of ``value``, which may do anything with it."""
    return isinstance(found, (MethodType, BuiltinMethodType)) and found.__self__ is value
