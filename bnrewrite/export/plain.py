"""A plain copy of a module: reverted, in eval mode, sharing every tensor with the original."""

import contextlib
import enum
import functools
import inspect
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bnrewrite.capture.restore import slots_of
from bnrewrite.capture.values import is_library
from bnrewrite.sites.classes import original_class, restored_class

_MARK = "_bnrewrite_"
_COMPILED = "_compiled_call_impl"
_COPIER = f"{_MARK}copier"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and (Distributed)DataParallel, if it is in any."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def forward_signature(model: nn.Module) -> inspect.Signature:
    """Arguments of the model's own forward, whatever conversion put in front of it."""
    if "forward" in model.__dict__:
        return inspect.signature(model.__dict__["forward"])
    forward: Any = original_class(model).forward
    return inspect.signature(forward.__get__(model))


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` as if it had never been converted, compiled or wrapped, in eval mode.

    Modules are copied, with the containers, objects, functions and bound methods that refer to
    them or keep what they compute; what several of them share, their copies share. Parameters,
    buffers and objects of libraries are shared with the original. Nothing of the user's runs: not
    ``train``, which subclasses override with side effects, not ``__deepcopy__``, which fails on
    process groups and on tensors that are not leaves, and not ``__del__``, which closes what the
    original goes on using.
    """
    copier = _Copier()
    plain = copier.module(model)
    # Weak references keep nothing alive.
    plain.__dict__[_COPIER] = copier
    return plain


class _Copier:
    """Copies values one by one and remembers which became which."""

    def __init__(self) -> None:
        # By identity; the originals are kept alive, so that numbers stay those of one object.
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []
        self._classes: dict[type, type] = {}

    def _remember(self, original: Any, copied: Any) -> Any:
        self._copies[id(original)] = copied
        self._originals.append(original)
        return copied

    def _class(self, cls: type) -> Any:
        """The class of a copy: one without ``__del__`` where ``cls`` has that."""
        if getattr(cls, "__del__", None) is None:
            return cls
        if cls not in self._classes:
            self._classes[cls] = _without_del(cls)
        return self._classes[cls]

    def module(self, original: nn.Module) -> nn.Module:
        if isinstance(original, torch.jit.ScriptModule):
            return original
        original = unwrap(original)
        if id(original) in self._copies:
            return self._copies[id(original)]
        copied = self._remember(original, _empty(self._class(restored_class(original))))
        for name, value in original.__dict__.items():
            if not name.startswith(_MARK):
                copied.__dict__[name] = self.value(value)
        copied.__dict__["training"] = False
        copied.__dict__.pop(_COMPILED, None)
        return copied

    def value(self, value: Any) -> Any:
        if type(value) in WEAK:
            return self._weak(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if id(value) in self._copies:
            return self._copies[id(value)]
        kind = type(value)
        if kind in (dict, OrderedDict, defaultdict, Counter):
            copied = self._remember(value, kind())
            if kind is defaultdict:
                copied.default_factory = value.default_factory
            for key, one in value.items():
                copied[key] = self.value(one)
            return copied
        if kind in (list, set, deque):
            copied = deque(maxlen=value.maxlen) if kind is deque else kind()
            self._remember(value, copied)
            (copied.update if kind is set else copied.extend)(map(self.value, value))
            return copied
        if kind is tuple:
            return kind(map(self.value, value))
        make = getattr(kind, "_make", None) if issubclass(kind, tuple) else None
        if make is not None:
            return make(map(self.value, value))
        if kind is MethodType:
            return self.method(value)
        if kind is FunctionType and value.__closure__:
            return self.function(value)
        if kind is functools.partial:
            arguments = map(self.value, value.args)
            keywords = {name: self.value(one) for name, one in value.keywords.items()}
            return functools.partial(self.value(value.func), *arguments, **keywords)
        if kind is SimpleNamespace or is_of_user(value):
            return self._object(value)
        return value

    def _weak(self, original: Any) -> Any:
        referred = referent(original)
        copied = self.value(referred)
        if copied is referred:
            return original
        return weakref.ref(copied) if type(original) is weakref.ref else weakref.proxy(copied)

    def method(self, original: MethodType) -> MethodType:
        """A method of a copy, which has the forward of its class where the original has that."""
        owner = original.__self__
        copied = self.value(owner)
        function = original.__func__
        if isinstance(owner, nn.Module) and function is type(owner).forward:
            function = type(copied).forward
        return MethodType(function, copied)

    def _object(self, original: Any) -> Any:
        """An object with attributes; itself where Python cannot make an empty one."""
        contents: Any = original
        base: Any = next((one for one in _BASES if isinstance(original, one)), object)
        try:
            copied = base.__new__(self._class(type(original)))
        except TypeError:
            return original
        self._remember(original, copied)
        if base is list:
            base.extend(copied, map(self.value, base.__iter__(contents)))
        elif base is dict:
            base.update(copied, {key: self.value(one) for key, one in base.items(contents)})
        for name, value in slots_of(original).items():
            object.__setattr__(copied, name, self.value(value))
        for name, value in getattr(original, "__dict__", {}).items():
            copied.__dict__[name] = self.value(value)
        return copied

    def function(self, original: FunctionType) -> FunctionType:
        """A function that closes over modules, as forwards put on an instance and hooks do."""
        closure = original.__closure__ or ()
        known = [id(cell) in self._copies for cell in closure]
        cells = tuple(
            self._copies[id(cell)] if is_known else self._remember(cell, CellType())
            for cell, is_known in zip(closure, known, strict=True)
        )
        copied = FunctionType(
            original.__code__,
            original.__globals__,
            original.__name__,
            original.__defaults__,
            cells,
        )
        copied.__kwdefaults__ = original.__kwdefaults__
        copied.__dict__.update(original.__dict__)
        self._remember(original, copied)
        for cell, before, is_known in zip(cells, closure, known, strict=True):
            # A cell may be empty: its variable was not assigned yet.
            with contextlib.suppress(ValueError):
                if not is_known:
                    cell.cell_contents = self.value(before.cell_contents)
        return copied


_BASES = (list, dict, SimpleNamespace)
"""Of which Python makes empty objects in ways of their own."""


def _empty(cls: type[nn.Module]) -> nn.Module:
    """A module of this very class; that of a GraphModule makes a new class each time."""
    try:
        return object.__new__(cls)
    except TypeError:
        return cls.__new__(cls)


WEAK = frozenset((weakref.ref, *weakref.ProxyTypes))


def referent(value: Any) -> Any:
    """What a weak reference or proxy refers to; None if that is gone."""
    if type(value) is weakref.ref:
        return value()
    try:
        # A proxy takes every attribute from what it refers to, also this method.
        return value.__reduce_ex__.__self__
    except ReferenceError:
        return None


class _WithoutDel:
    """First base of a class whose objects do nothing when they go."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Not that of the user's class, which may keep a list of its subclasses."""

    def __del__(self) -> None:
        """Not that of the user's class."""


def _without_del(cls: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__slots__": ()}
    # A metaclass of the user's, which may keep a list of its classes, does not run.
    return type.__new__(type(cls), cls.__name__, (_WithoutDel, cls), names)


def is_of_user(value: Any) -> bool:
    """Whether ``value`` is an object of a class of the user's, which may refer to modules."""
    return (
        not is_library(type(value).__module__)
        and not isinstance(value, (type, ModuleType, FunctionType, enum.Enum, BaseException))
        and not isinstance(value, (torch.Tensor, OrderedDict))
        and (isinstance(getattr(value, "__dict__", None), dict) or bool(slots_of(value)))
    )
