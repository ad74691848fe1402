"""Values that no trace may read: others may change them, or reading them does."""

import array
import collections.abc
import contextvars
import ctypes
import random
import threading
import weakref
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch

from bnrewrite.capture.values import LIBRARIES, is_library


def unreadable(value: Any) -> str:
    """Why a trace may not read ``value``; "" if it may."""
    kind = type(value).__name__
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return "reads an array of objects"
    if isinstance(value, _RANDOM):
        return "draws random numbers outside the graph"
    if isinstance(value, collections.abc.Iterator):
        return f"reads an iterator ({kind})"
    if isinstance(value, _SHARED) or _is_of_c(type(value)):
        return f"reads a {kind}, which other code may change"
    return ""


_RANDOM = (random.Random, np.random.Generator, np.random.RandomState)

_SHARED = (
    contextvars.ContextVar, threading.local, ctypes._SimpleCData, ctypes.Array, weakref.ref,
    weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary,
    collections.abc.KeysView, collections.abc.ValuesView, collections.abc.ItemsView,
    bytearray, memoryview, array.array, Executor, torch.Stream, torch.Event, torch.cuda.Stream,
    torch.cuda.Event,
)  # fmt: skip
"""Values that depend on the thread, on the context, on other processes, or that are mere memory."""

_COMPUTES = frozenset((
    *LIBRARIES,
    "builtins", "types", "functools", "operator", "re", "datetime", "decimal", "typing",
    "collections", "_collections", "_abc", "random", "_random", "_struct",
))  # fmt: skip
"""Modules whose classes in C only compute, or are looked into by themselves."""

_HEAP, _IMMUTABLE = 1 << 9, 1 << 8
"""Flags of classes: what is made when it runs, as all are that are written in Python."""


def _is_of_c(cls: type) -> bool:
    """Whether code in C, of which nothing is known, may change objects of ``cls``, such as locks.

    Functions of extensions are called as other functions of C are, descriptors are no objects that
    anybody keeps, and tuples like ``sys.version_info`` never change.
    """
    return not (hasattr(cls, "__get__") or issubclass(cls, tuple)) and any(
        is_fixed(base)
        and str(base.__module__).partition(".")[0] not in _COMPUTES
        and (is_library(base.__module__) or "__call__" not in vars(base))
        for base in cls.__mro__
    )


def is_fixed(cls: type) -> bool:
    """Whether nobody can change ``cls``, as those in C."""
    return not cls.__flags__ & _HEAP or bool(cls.__flags__ & _IMMUTABLE)
