"""Notes what traced code reads besides modules: what these hold, and what functions name.

A trace bakes in the value of a global flag, of an attribute of a configuration, of an element of a
list. What functions name is found in their code, before they run; attributes of objects are noted
when they are read.
"""

import collections
import contextlib
import dataclasses
import operator
import os
import random
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnrewrite.capture.candidates import code_names
from bnrewrite.capture.seen import (
    CONSTANTS,
    CONTAINERS,
    MISSING,
    Looks,
    Seen,
    is_library,
    parts,
    routines,
    same_keys,
)

_RANDOM = (random.Random, np.random.Generator, np.random.RandomState)

_MOST = 1000
"""Elements of a container that are still compared at every call."""


def _autocast() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    return tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)


ASKED: dict[str, Callable[[], Any]] = {
    "is_grad_enabled": torch.is_grad_enabled,
    "is_inference_mode_enabled": torch.is_inference_mode_enabled,
    "is_autocast_enabled": _autocast,
    "get_autocast_dtype": _autocast,
    "get_default_dtype": torch.get_default_dtype,
    "get_default_device": torch.get_default_device,
    "are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled,
    "get_num_threads": torch.get_num_threads,
    "environ": lambda: dict(os.environ),
    "getenv": lambda: dict(os.environ),
    "is_compiling": torch.compiler.is_compiling,
    "is_exporting": torch.compiler.is_exporting,
    "is_tracing": torch.jit.is_tracing,
    "is_in_onnx_export": torch.onnx.is_in_onnx_export,
    "is_initialized": dist.is_initialized,
    "get_rank": lambda: dist.get_rank() if dist.is_initialized() else None,
    "get_world_size": lambda: dist.get_world_size() if dist.is_initialized() else None,
}
"""What code may ask torch or the system for, by the names of the functions."""

_TRACING = frozenset(("is_fx_tracing", "is_fx_symbolic_tracing"))
"""Those with another answer in a trace than in a call."""

COMPILING = frozenset(("is_compiling", "is_exporting", "is_tracing", "is_in_onnx_export"))
"""Those with another answer while a compiler traces."""


@dataclasses.dataclass(frozen=True)
class Outside:
    """What functions named and asked for: the same for all modules of a process.

    Attributes:
        values: by the holder and the name there, what was found. Holders are dictionaries of
            globals and of defaults, classes, functions and cells.
        answers: of torch, by the name of the question.
    """

    values: dict[tuple[int, str], Seen] = dataclasses.field(default_factory=dict)
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)
    holders: dict[int, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read."""
        return not (self.values or self.answers)

    def holds(self) -> bool:
        """Whether all of it is still so."""
        for (number, name), seen in self.values.items():
            value = _read(self.holders[number], name)
            # The common case, without a call.
            if value is seen.value and type(seen) is Seen:
                continue
            if not seen.matches(value, None):
                return False
        return all(ASKED[name]() == answer for name, answer in self.answers.items())


def _read(holder: Any, name: str) -> Any:
    if isinstance(holder, dict):
        return holder.get(name, MISSING)
    if isinstance(holder, type):
        return vars(holder).get(name, MISSING)
    if isinstance(holder, FunctionType):
        return holder.__defaults__
    try:
        return holder.cell_contents
    except ValueError:
        return MISSING


def _write(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    elif isinstance(holder, type):
        setattr(holder, name, value)
    elif isinstance(holder, FunctionType):
        holder.__defaults__ = value
    else:
        holder.cell_contents = value


class Reads:
    """What one trace reads of objects, containers and names.

    Args:
        tracer: that records; it is asked to refuse what a graph could not stand for.

    Attributes:
        asks_types: whether the code may look at types of modules without asking ``isinstance``.
    """

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._classes = contextlib.ExitStack()
        self._patched: set[type] = set()
        self._codes: set[CodeType] = set()
        # By identity; what is here is kept alive, so that numbers stay those of one object.
        self._known: dict[int, Any] = {}
        self._copies: dict[int, Any] = {}
        self._objects: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._attributes: dict[int, dict[str, Any]] = collections.defaultdict(dict)
        self._named: dict[tuple[int, str], Any] = {}
        self._outside = Outside()
        self._traced: list[type] = []
        self.asks_types = False

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Classes of objects that are read tell of it until the end."""
        with self._classes:
            yield

    def see(self, value: Any) -> None:
        """Notes that the traced code may look into ``value`` from now on."""
        if isinstance(value, (CONSTANTS, Tensor, nn.Module)) or id(value) in self._known:
            return
        self._known[id(value)] = value
        for function in routines(value):
            self.see_code(function)
        if isinstance(value, CONTAINERS):
            keys, elements = parts(value)
            if len(elements) + len(keys) > 2 * _MOST:
                self._tracer.refuse(f"reads a {type(value).__name__} of {len(elements)} entries")
            self._copies[id(value)] = keys, elements
            for one in elements:
                self.see(one)
        if isinstance(value, _RANDOM):
            self._tracer.refuse("draws random numbers in Python")
        if isinstance(value, collections.abc.Iterator):
            self._tracer.refuse(f"reads an iterator, a {type(value).__name__}")
        if not is_library(type(value).__module__):
            attributes = _attributes_of(value)
            self._objects[id(value)] = attributes, dict(attributes)
            self._watch(type(value))

    def _watch(self, cls: type) -> None:
        """Has objects of ``cls`` tell which attributes are read, and finds what methods name."""
        if cls in self._patched:
            return
        self._patched.add(cls)
        for base in cls.__mro__:
            if not is_library(base.__module__) and base is not object:
                for name, value in list(vars(base).items()):
                    # Those that operators call are not read as attributes.
                    if name.startswith("__") and name not in ("__init__", "__new__"):
                        for function in routines(value):
                            self.see_code(function)
        own = vars(cls).get("__getattribute__")
        read: Any = cls.__getattribute__
        try:
            cls.__getattribute__ = self._noted(read, getattr(cls, "__getattr__", None))
        except TypeError:
            return
        if own is None:
            self._classes.callback(delattr, cls, "__getattribute__")
        else:
            self._classes.callback(setattr, cls, "__getattribute__", own)

    def _noted(self, read: Callable[[Any, str], Any], look_up: Any) -> Any:
        def getattribute(value: Any, name: str) -> Any:
            if not self._tracer.recording or id(value) not in self._known or _is_special(name):
                return read(value, name)
            try:
                found = read(value, name)
            except AttributeError:
                if look_up is None:
                    self._attributes[id(value)].setdefault(name, MISSING)
                    raise
                try:
                    found = look_up(value, name)
                except AttributeError:
                    self._attributes[id(value)].setdefault(name, MISSING)
                    raise
            self.see(found)
            self._attributes[id(value)].setdefault(name, found)
            return found

        return getattribute

    def see_code(self, function: Any) -> None:
        """Notes what the code of ``function`` names, if it is no library's."""
        if not isinstance(function, FunctionType) or function.__code__ in self._codes:
            return
        if is_library(function.__module__):
            return
        self._codes.add(function.__code__)
        names = code_names(function.__code__)
        if "type" in names or "__class__" in names:
            self.asks_types = True
            for cls in self._traced:
                for name in names:
                    self.see_in_class(cls, name)
        for name in names & _TRACING:
            self._tracer.refuse(f"asks {name}()")
        for name in names & ASKED.keys():
            self._outside.answers[name] = ASKED[name]()
        for name in names & function.__globals__.keys():
            self._name(function.__globals__, name, names)
        for cell in function.__closure__ or ():
            self._name(cell, "", names)
        for name in function.__kwdefaults__ or {}:
            self._name(function.__kwdefaults__, name, names)
        if function.__defaults__:
            self._name(function, "", names)

    def _name(self, holder: Any, name: str, names: frozenset[str]) -> None:
        """Notes one value that code names, and what it may read of that by ``names``."""
        value = _read(holder, name)
        if (id(holder), name) in self._named or value is MISSING:
            return
        if isinstance(value, ModuleType) and is_library(value.__name__):
            return
        self._outside.holders[id(holder)] = holder
        self._named[id(holder), name] = value
        if isinstance(value, ModuleType):
            for one in names & vars(value).keys():
                self._name(vars(value), one, names)
        elif isinstance(value, type):
            for one in names:
                self.see_in_class(value, one)
                self.see_in_class(type(value), one)
        else:
            if isinstance(value, FunctionType):
                for one in names & vars(value).keys():
                    self._name(vars(value), one, names)
            self.see(value)

    def see_forward(self, cls: type) -> None:
        """Notes that the forward of a class is traced from now on."""
        self._traced.append(cls)
        self.see_in_class(cls, "forward")

    def see_in_class(self, cls: type, name: str) -> None:
        """Notes that ``name`` may be read of a class, and of those that it overrides."""
        for base in cls.__mro__:
            if name in vars(base) and not is_library(base.__module__):
                self._name(base, name, frozenset())

    def undo(self) -> str:
        """Puts back what the traced code changed, and says what that was; "" if nothing."""
        changed = ""
        for number, (keys, elements) in self._copies.items():
            value = self._known[number]
            now_keys, now = parts(value)
            if (
                len(now) != len(elements)
                or not same_keys(now_keys, keys)
                or not all(map(operator.is_, now, elements))
            ):
                changed = "changes a list, set or dict that it keeps"
                _refill(value, keys, elements)
        for number, (attributes, before) in self._objects.items():
            if not _identical(attributes, before):
                kind = type(self._known[number]).__name__
                changed = f"changes an attribute of an object that it keeps, a {kind}"
                attributes.clear()
                attributes.update(before)
        for (number, name), before in self._named.items():
            holder = self._outside.holders[number]
            if _read(holder, name) is not before:
                changed = f"changes {name or 'a variable'}, which it shares with others"
                _write(holder, name, before)
        return changed

    def looks(self, paths: dict[int, str]) -> Looks:
        """What was read, for values of modules with these paths."""
        return Looks(paths, self._attributes, self._copies)

    def outside(self, looks: Looks) -> Outside:
        """What was read that is the same for all modules."""
        values = {place: looks.of(value) for place, value in self._named.items()}
        return dataclasses.replace(self._outside, values=values)


def _attributes_of(value: Any) -> dict[str, Any]:
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        # It has slots.
        return {}


def _is_special(name: str) -> bool:
    return name.startswith("__") and name != "__dict__"


def _identical(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is before[name] for name in now)


def _refill(value: Any, keys: tuple[Any, ...], elements: tuple[Any, ...]) -> None:
    """Gives a container its keys and elements back."""
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    value.clear()
    if isinstance(value, dict):
        value.update(zip(keys, elements, strict=True))
    elif isinstance(value, set):
        value.update(*keys)
    else:
        value.extend(elements)
