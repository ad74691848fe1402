"""Notes what traced code reads besides modules: what these hold, and what functions name.

A trace bakes in the value of a global flag, of an attribute of a configuration, of an element of a
list. What functions name is found in their code, before they run; attributes of objects are noted
when they are read.
"""

import collections
import contextlib
import dataclasses
import functools
import operator
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from bnrewrite.capture.acts import is_stand_in, stand_in
from bnrewrite.capture.apart import NO_OPERATORS, ModulesApart
from bnrewrite.capture.bytecode import global_names, imported_names, names_in_strings
from bnrewrite.capture.candidates import code_names
from bnrewrite.capture.comparisons import own_code, watch_comparisons
from bnrewrite.capture.objects import Objects
from bnrewrite.capture.outside import ASKED, Outside, read_of, write_to
from bnrewrite.capture.patches import RECORDING, record_act, record_questions
from bnrewrite.capture.questions import asks_unseen, is_question
from bnrewrite.capture.restore import attributes_of, give_back, identical, refill
from bnrewrite.capture.seen import Looks
from bnrewrite.capture.unfollowed import unfollowed, unfollowed_value
from bnrewrite.capture.unreadable import unreadable
from bnrewrite.capture.values import (
    CONSTANTS,
    CONTAINERS,
    MISSING,
    holds_data,
    is_configuration,
    is_library,
    is_method,
    parts,
    routines,
    same_keys,
)

_LOOKS_UP = frozenset(("getattr", "hasattr", "vars", "__dict__", "attrgetter"))
"""What code names that finds attributes by strings."""

_STREAMS = frozenset(("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"))

_TYPES = frozenset(("type", "__class__", "_get_name", "typename"))
"""What code names that looks at types of modules without asking ``isinstance``."""

_SETTERS = ("__setattr__", "__delattr__")

_LAZY = ("__annotate__", "__annotate_func__")
"""Functions that Python 3.14 has in classes for their annotations: no operators."""

_MOST = 1000
"""Elements of a container that are still compared at every call."""


class Reads:
    """What one trace reads of objects, containers and names.

    Args:
        tracer: that records; it is asked to refuse what a graph could not stand for.

    Attributes:
        asks_types: whether the code may look at types of modules without asking ``isinstance``.
        apart: modules that the traced one does not contain.
    """

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._functions: dict[int, FunctionType] = {}
        self._names: set[str] = set()
        # By identity; what is here is kept alive, so that numbers stay those of one object.
        self._known: dict[int, Any] = {}
        self._copies: dict[int, Any] = {}
        self._kept: dict[int, dict[str, Any]] = {}
        self._attributes: dict[int, dict[str, Any]] = collections.defaultdict(dict)
        self._named: dict[tuple[int, str], Any] = {}
        self._looked: set[tuple[int, str, frozenset[str]]] = set()
        self._outside = Outside()
        self._traced: list[type] = []
        self._made: list[type] = []
        self._modules: dict[int, ModuleType] = {}
        self._imports: list[tuple[FunctionType, frozenset[str]]] = []
        self._objects = Objects(tracer, self._known, self.see_getter, self._note)
        see_operators = functools.partial(self._see_operators, but=NO_OPERATORS)
        self.apart = ModulesApart(tracer, self._known, self.see_in_class, see_operators, self._note)
        self.asks_types = False

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Classes of objects that are read tell of it until the end."""
        with self._objects:
            yield

    def keep(self, value: Any) -> None:
        """Notes what a table of a module holds, which is put back if the traced code changes it."""
        if isinstance(value, dict) and id(value) not in self._known:
            self._known[id(value)] = value
            self._copies[id(value)] = parts(value)

    def see(self, value: Any) -> None:
        """Notes that the traced code may look into ``value`` from now on."""
        if isinstance(value, type):
            self._see_class(value)
        if isinstance(value, (CONSTANTS, Tensor)) or id(value) in self._known:
            return
        if isinstance(value, nn.Module):
            self.apart.see(value, list(self._names) if self.asks_types else [])
            return
        self._known[id(value)] = value
        if asks_unseen(value) or stand_in(value) is not None:
            self._tracer.refuse(f"calls {value.__name__} by another name")
        for function in routines(value):
            self.see_code(function)
        if is_method(value):
            self.see(value.__self__)
        if isinstance(value, CONTAINERS):
            keys, elements = parts(value)
            if len(elements) + len(keys) > 2 * _MOST:
                self._tracer.refuse(f"reads a {type(value).__name__} with {len(elements)} entries")
            self._copies[id(value)] = keys, elements
            for one in (*keys, *elements):
                self.see(one)
        if isinstance(value, ModuleType) and not is_library(value.__name__):
            self._see_module(value, frozenset(self._names))
        reason = unreadable(value)
        if reason:
            self._tracer.refuse(reason)
        if is_configuration(type(value)):
            self._watch(type(value))
        elif not is_library(type(value).__module__) or holds_data(type(value)):
            self._kept[id(value)] = attributes_of(value)
            self._watch(type(value))

    def _watch(self, cls: type) -> None:
        """Has objects of ``cls`` tell which attributes are read, and finds what methods name."""
        if cls in self._objects.classes:
            return
        for name in list(self._names) if self.asks_types else ():
            self.see_in_class(cls, name)
        self._see_operators(cls, but=("__init__", "__new__"))
        self._objects.watch(cls)

    def _see_operators(self, cls: type, but: tuple[str, ...] = ()) -> None:
        """Sees methods that are not read as attributes, since operators call them."""
        for base in cls.__mro__:
            if not is_library(base.__module__):
                for name, value in list(vars(base).items()):
                    if name.startswith("__") and name not in (*but, *_LAZY) and routines(value):
                        self.see_in_class(cls, name)

    def _see_class(self, cls: type) -> None:
        """Notes that the traced code may make objects of ``cls``, and read these.

        Modules tell which of their attributes are read.
        """
        if cls in self._made or issubclass(cls, nn.Module) or is_library(cls.__module__):
            return
        self._made.append(cls)
        self._see_operators(cls)
        for name in list(self._names):
            self.see_in_class(cls, name)

    def see_getter(self, cls: type, name: str) -> None:
        """Sees the code that runs when ``name`` of an object of ``cls`` is read, before it does."""
        for base in cls.__mro__:
            found = vars(base).get(name)
            if found is not None:
                if not isinstance(found, FunctionType) and hasattr(type(found), "__get__"):
                    self.see_in_class(cls, name)
                return

    def _note(self, value: Any, name: str, found: Any) -> None:
        """Notes that the traced code has read an attribute of an object."""
        if found is not MISSING:
            self.see(found)
        self._attributes[id(value)].setdefault(name, found)

    def see_code(self, function: Any) -> None:
        """Notes what the code of ``function`` names, if it is no library's."""
        if not isinstance(function, FunctionType) or id(function) in self._functions:
            return
        if is_library(function.__module__):
            return
        self._functions[id(function)] = self._outside.holders[id(function)] = function
        self._named[id(function), "__code__"] = own_code(function)
        names = code_names(function.__code__)
        record_questions(function, names, self._tracer)
        found = global_names(function.__code__)
        for reason in unfollowed(function, names, found):
            self._tracer.refuse(reason)
        watch_comparisons(function)
        if not names.isdisjoint(_SETTERS):
            self._tracer.keep_attributes()
        self.asks_types |= not names.isdisjoint(_TYPES)
        if self.asks_types or "super" in names:
            for cls in (*self._traced, *self._objects.classes, *self.apart.classes):
                for name in names:
                    self.see_in_class(cls, name)
        read = names
        if not names.isdisjoint(_LOOKS_UP):
            read = names | names_in_strings(function.__code__)
        new = read - self._names
        self._names |= new
        for cls in self._made:
            for name in new:
                self.see_in_class(cls, name)
        for name in names & ASKED.keys():
            self._outside.answers[name] = ASKED[name]()
        for name in found & function.__globals__.keys():
            self._name(function.__globals__, name, read)
        if imported_names(function.__code__):
            self._imports.append((function, read))
        for module in [*self._modules.values()]:
            for name in new & vars(module).keys():
                self._name(vars(module), name, read)
        for cell in function.__closure__ or ():
            self._name(cell, "", read)
        for name in function.__kwdefaults__ or {}:
            self._name(function.__kwdefaults__, name, read)
        if function.__defaults__:
            self._name(function, "", read)

    def see_imports(self) -> None:
        """Notes, when the traced code has run, what it read of modules that it imports itself."""
        for function, names in self._imports:
            package = str(function.__globals__.get("__package__") or "")
            for name in imported_names(function.__code__):
                for one in {name, f"{package}.{name}".strip(".")} & sys.modules.keys():
                    self._name(sys.modules, one, names)

    def _see_module(self, module: ModuleType, names: frozenset[str]) -> None:
        """Notes what code reads of a module by ``names``, and other code that it is given to."""
        self._modules.setdefault(id(module), module)
        for name in (names | self._names) & vars(module).keys():
            self._name(vars(module), name, names)

    def _name(self, holder: Any, name: str, names: frozenset[str]) -> None:
        """Notes one value that code names, and what it may read of that by ``names``."""
        value = _unrecorded(read_of(holder, name))
        looked = id(holder), name, names
        if looked in self._looked or value is MISSING or is_question(value) or is_stand_in(value):
            return
        self._looked.add(looked)
        if isinstance(holder, dict) and record_act(holder, name):
            return
        for reason in unfollowed_value(value, names):
            self._tracer.refuse(reason)
        if isinstance(value, ModuleType) and is_library(value.__name__):
            for one in names & _STREAMS if value is sys else ():
                self.see(vars(sys)[one])
            return
        self._outside.holders[id(holder)] = holder
        self._named.setdefault((id(holder), name), value)
        if isinstance(value, ModuleType):
            self._see_module(value, names)
        elif isinstance(value, type):
            for one in names:
                self.see_in_class(value, one)
                self.see_in_class(type(value), one)
            self._see_class(value)
        else:
            if isinstance(value, FunctionType):
                for one in names & vars(value).keys():
                    self._name(vars(value), one, names)
            self.see(value)

    def see_forward(self, cls: type) -> None:
        """Notes that the forward of a class is traced from now on."""
        self._traced.append(cls)
        if any(getattr(cls, name) is not getattr(nn.Module, name) for name in _SETTERS):
            self._tracer.keep_attributes()
        self.see_in_class(cls, "forward")

    def see_in_class(self, cls: type, name: str) -> None:
        """Notes that ``name`` may be read of a class, and of those that it overrides.

        Where a class inherits it, it may define its own later.
        """
        if name == "__getattribute__" or not any(name in vars(base) for base in cls.__mro__):
            return
        for base in cls.__mro__:
            if is_library(base.__module__):
                continue
            if name in vars(base):
                self._name(base, name, frozenset())
            else:
                self._outside.holders[id(base)] = base
                self._named.setdefault((id(base), name), MISSING)

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
                changed = "changes a list, set or dict that outlives the call"
                refill(value, keys, elements)
        for number, before in self._kept.items():
            value = self._known[number]
            if not identical(attributes_of(value), before):
                kind = type(value).__name__
                changed = f"changes an attribute of a {kind} that outlives the call"
                give_back(value, before)
        for (number, name), before in self._named.items():
            holder = self._outside.holders[number]
            if _unrecorded(read_of(holder, name)) is not before:
                changed = f"changes {name or 'a variable'}, which other code shares"
                write_to(holder, name, before)
        return changed

    def looks(self, paths: dict[int, str]) -> Looks:
        """What was read, for values of modules with these paths."""
        return Looks(paths, self._attributes, self._copies)

    def outside(self, looks: Looks) -> Outside:
        """What was read that is the same for all modules, with looks that saw nothing else."""
        values = {place: looks.of(value) for place, value in self._named.items()}
        if looks.met_inside:
            self._tracer.note_refusal("reads a variable that holds it, or what it contains")
        return dataclasses.replace(self._outside, values=values)


def _unrecorded(value: Any) -> Any:
    """A function itself, where one stands in its place for the trace that records its calls."""
    records = isinstance(value, FunctionType) and value.__code__ is RECORDING
    return vars(value)["__wrapped__"] if records else value
