"""What a value looked like when traced code read it, to tell later whether another looks the same.

Not identity: modules of one structure share a graph, and copies of a model have copies of what its
modules hold. Of an object only the attributes count that were read, of a list, set or dict all of
it.
"""

import collections
import dataclasses
import enum
import functools
import inspect
import math
import os
import sys
import sysconfig
import threading
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnrewrite.capture.alike import alike
from bnrewrite.guards import is_compiling
from bnrewrite.sites.classes import below, original_class

CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device,
    torch.layout, torch.memory_format, enum.Enum, np.generic, range, slice,
)  # fmt: skip

SEQUENCES = (list, tuple, collections.deque)
SETS = (set, frozenset)
MAPPINGS = (dict, types.MappingProxyType)
CONTAINERS = (*SEQUENCES, *SETS, *MAPPINGS, types.SimpleNamespace, functools.partial)

_METHODS_IN_C = (types.BuiltinMethodType, types.MethodWrapperType)

MISSING = enum.Enum("MISSING", "MISSING").MISSING
"""Stands for an attribute that was asked for and is not there."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """A value that stands for itself: a constant, a function, or what nobody can look into."""

    value: Any

    def matches(self, value: Any, owner: nn.Module | None) -> bool:
        """Whether ``value`` looks the same; paths of modules begin at ``owner``."""
        return same(value, self.value)


@dataclasses.dataclass(frozen=True)
class _SeenParts(Seen):
    """A container or an object: ``value`` is its class; parts are elements, and attributes.

    So is a module that is not below the owner.
    """

    keys: tuple[Any, ...] = ()
    elements: tuple[Seen, ...] = ()
    attributes: tuple[tuple[str, Seen], ...] = ()

    def matches(self, value: Any, owner: nn.Module | None) -> bool:
        if _kind(value) is not self.value:
            return False
        keys, elements = parts(value)
        if len(elements) != len(self.elements) or not same_keys(keys, self.keys):
            return False
        for seen, element in zip(self.elements, elements, strict=True):
            if not seen.matches(element, owner):
                return False
        for name, seen in self.attributes:
            if not seen.matches(getattr(value, name, MISSING), owner):
                return False
        return True


@dataclasses.dataclass(frozen=True)
class _SeenTensor(Seen):
    """A tensor, whose values a trace cannot read: ``value`` is what it can."""

    def matches(self, value: Any, owner: nn.Module | None) -> bool:
        return isinstance(value, Tensor) and described(value) == self.value


@dataclasses.dataclass(frozen=True)
class _SeenArray(Seen):
    """An array of numpy: ``value`` is its dtype, shape and bytes."""

    def matches(self, value: Any, owner: nn.Module | None) -> bool:
        # For a compiler it is a tensor, whose values it does not know.
        compiling = is_compiling()
        return not compiling and isinstance(value, np.ndarray) and _of_array(value) == self.value


@dataclasses.dataclass(frozen=True)
class _SeenModule(Seen):
    """A module below the owner: ``value`` is its path."""

    def matches(self, value: Any, owner: nn.Module | None) -> bool:
        return owner is not None and below(owner, self.value) is value


@dataclasses.dataclass(frozen=True)
class _SeenMethod(Seen):
    """A method of a module or an object, which is not kept: ``value`` is its function.

    Attributes:
        of: what the method belongs to.
    """

    of: Seen

    def matches(self, value: Any, owner: nn.Module | None) -> bool:
        if type(value) is not types.MethodType or value.__func__ is not self.value:
            return False
        return self.of.matches(value.__self__, owner)


@dataclasses.dataclass(frozen=True)
class _SeenMethodInC(Seen):
    """A method of a container: ``value`` is its name."""

    of: Seen

    def matches(self, value: Any, owner: nn.Module | None) -> bool:
        return (
            isinstance(value, _METHODS_IN_C)
            and value.__name__ == self.value
            and self.of.matches(value.__self__, owner)
        )


@dataclasses.dataclass(frozen=True)
class SeenBelow(Seen):
    """What a module saw whose graph became part of an owner's: ``value`` is its path."""

    seen: Seen

    def matches(self, value: Any, owner: nn.Module | None) -> bool:
        """Whether ``value`` looks the same; paths of modules begin below ``owner``."""
        return self.seen.matches(value, None if owner is None else below(owner, self.value))


class Looks:
    """Makes :class:`Seen` of values.

    Args:
        paths: of the modules below the owner, by identity.
        attributes: what was read of objects, by identity and name.
        copies: of containers, by identity, from before the trace.
    """

    def __init__(
        self, paths: dict[int, str], attributes: dict[int, dict[str, Any]], copies: dict[int, Any]
    ) -> None:
        self._paths = paths
        self._attributes = attributes
        self._copies = copies
        self._open: set[int] = set()

    def of(self, value: Any) -> Seen:
        """What ``value`` looked like."""
        if isinstance(value, Tensor):
            return _SeenTensor(described(value))
        if id(value) in self._paths:
            return _SeenModule(self._paths[id(value)])
        if isinstance(value, types.MethodType):
            # Copies of a module have methods of their own.
            return _SeenMethod(value.__func__, self.of(value.__self__))
        if is_method(value):
            return _SeenMethodInC(value.__name__, self.of(value.__self__))
        if isinstance(value, np.ndarray):
            return _SeenArray(_of_array(value))
        read = self._attributes.get(id(value), {})
        if not (isinstance(value, (*CONTAINERS, nn.Module)) or read):
            return Seen(value)
        if id(value) in self._open:
            return _SeenParts(_kind(value), *_empty(value))
        self._open.add(id(value))
        keys, elements = self._copies.get(id(value)) or parts(value)
        seen = _SeenParts(
            _kind(value),
            keys,
            tuple(map(self.of, elements)),
            tuple((name, self.of(one)) for name, one in read.items()),
        )
        self._open.remove(id(value))
        return seen


def _kind(value: Any) -> type:
    """The class of a value, which for a module is that from before conversion."""
    return original_class(value) if isinstance(value, nn.Module) else type(value)


def is_method(value: Any) -> bool:
    """Whether ``value`` is a method of an object or a container, whose contents it may read."""
    return isinstance(value, types.MethodType) or (
        isinstance(value, _METHODS_IN_C) and isinstance(value.__self__, CONTAINERS)
    )


def parts(value: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What tells the elements of a container apart, if anything does, and the elements.

    Of anything else, nothing.
    """
    if isinstance(value, MAPPINGS):
        return tuple(value), tuple(value.values())
    if isinstance(value, SEQUENCES):
        return (), tuple(value)
    if isinstance(value, SETS):
        return (frozenset(value),), ()
    if isinstance(value, types.SimpleNamespace):
        return tuple(vars(value)), tuple(vars(value).values())
    if isinstance(value, functools.partial):
        return (), (value.func, value.args, value.keywords)
    return (), ()


def _empty(value: Any) -> tuple[Any, ...]:
    """Of a container inside itself nothing more is compared."""
    keys, elements = parts(value)
    return keys, (_ANYTHING,) * len(elements)


@dataclasses.dataclass(frozen=True)
class _Anything(Seen):
    def matches(self, value: Any, owner: nn.Module | None) -> bool:
        return True


_ANYTHING = _Anything(None)


def same_keys(keys: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """Whether two containers have the same keys in the same order."""
    return len(keys) == len(before) and all(map(same, keys, before))


def same(value: Any, before: Any) -> bool:
    """Whether ``value`` is, or equals and has the same type as, what was there before.

    What refuses to be compared, as tables do that compare element by element, is another one.
    """
    if value is before:
        return True
    if type(value) is not type(before):
        return False
    try:
        equal = bool(value == before)
    except Exception:
        return False
    if equal and type(value) is float and value == 0.0:
        # Zeros have signs, which divisions tell.
        return math.copysign(1, value) == math.copysign(1, before)
    # Those of {1} and {True} are equal, too.
    return equal and (type(value) not in _OF_EQUALS or alike(value, before))


_OF_EQUALS = (set, frozenset, slice, range)


def described(tensor: Tensor) -> tuple[Any, ...]:
    """What a trace can read of a tensor."""
    return tensor.dtype, tuple(tensor.shape), tensor.device, tensor.requires_grad


def _of_array(array: np.ndarray) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


def is_library(module: Any) -> bool:
    """Whether code of the module of this name is not looked into."""
    name = str(module)
    top = name.partition(".")[0]
    if top in LIBRARIES or _of_configurations(name):
        return True
    return top in sys.stdlib_module_names and name != "__main__" and _is_of_python(name)


def _is_of_python(name: str) -> bool:
    """Whether a module with a name of Python's library is Python's, and no one of the user's."""
    module = sys.modules.get(name)
    if module is None:
        return False
    file = getattr(module, "__file__", None)
    return file is None or (file.startswith(_PYTHON) and not file.startswith(_INSTALLED))


LIBRARIES = {"torch", "numpy", "bnrewrite"}

_CONFIGURATIONS = ("omegaconf", "pydantic", "pydantic_core", "transformers.configuration_utils")
"""Packages whose objects hold configurations."""


def _of_configurations(module: Any) -> bool:
    """Whether the module of this name belongs to such a package."""
    return f"{module}.".startswith(tuple(f"{name}." for name in _CONFIGURATIONS))


def is_configuration(cls: type) -> bool:
    """Whether objects of ``cls`` are configurations: see :mod:`bnrewrite.capture.objects`."""
    return any(_of_configurations(base.__module__) for base in cls.__mro__)


_PYTHON, _INSTALLED = (
    tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in names)
    for names in (("stdlib", "platstdlib"), ("purelib", "platlib"))
)

_DATA = frozenset(("argparse", "collections", "configparser", "multiprocessing", "optparse"))


def holds_data(cls: type) -> bool:
    """Whether a class of Python's library holds data like classes of a user do."""
    return cls.__module__.partition(".")[0] in _DATA or cls is threading.Event


def routines(value: Any) -> Iterable[Any]:
    """Functions that code may call by calling ``value``, or by reading it from a class."""
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        return (value.__func__,)
    if isinstance(value, property):
        return tuple(one for one in (value.fget,) if one is not None)
    if isinstance(value, (functools.partial, functools.partialmethod, functools.cached_property)):
        return (value.func,)
    if isinstance(value, functools._lru_cache_wrapper):
        return (value.__wrapped__,)
    return (value,) if inspect.isfunction(value) else ()
