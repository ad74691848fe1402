"""Kinds of values that traced code may read, what they consist of, and when two are the same."""

import collections
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
from torch.nn.parameter import is_lazy

from bnrewrite.capture.alike import alike

CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device,
    torch.layout, torch.memory_format, enum.Enum, np.generic, range, slice,
)  # fmt: skip

SEQUENCES = (list, tuple, collections.deque)
SETS = (set, frozenset)
MAPPINGS = (dict, types.MappingProxyType)
CONTAINERS = (*SEQUENCES, *SETS, *MAPPINGS, types.SimpleNamespace, functools.partial)

METHODS_IN_C = (types.BuiltinMethodType, types.MethodWrapperType)

MISSING = enum.Enum("MISSING", "MISSING").MISSING
"""Stands for an attribute that was asked for and is not there."""


def is_method(value: Any) -> bool:
    """Whether ``value`` is a method of an object or a container, whose contents it may read."""
    return isinstance(value, types.MethodType) or (
        isinstance(value, METHODS_IN_C) and isinstance(value.__self__, CONTAINERS)
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
        if all(map(is_plain, value)):
            return (frozenset(value),), ()
        return (), tuple(value)
    if isinstance(value, types.SimpleNamespace):
        return tuple(vars(value)), tuple(vars(value).values())
    if isinstance(value, functools.partial):
        return (), (value.func, value.args, value.keywords)
    return (), ()


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a constant, or made of constants that are compared as they are."""
    return isinstance(value, CONSTANTS) or (
        isinstance(value, (tuple, frozenset)) and all(map(is_plain, value))
    )


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
    return (
        tensor.dtype,
        None if is_lazy(tensor) else tuple(tensor.shape),
        tensor.device,
        tensor.layout,
        tensor.requires_grad,
        isinstance(tensor, nn.Parameter),
    )


def of_array(array: np.ndarray) -> tuple[Any, ...]:
    """What a trace can read of an array."""
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
