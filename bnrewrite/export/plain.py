"""A plain copy of a module: reverted, in eval mode, sharing every tensor with the original."""

import contextlib
import functools
import inspect
from collections import OrderedDict, defaultdict
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bnrewrite.sites.classes import original_class

_MARK = "_bnrewrite_"
_COMPILED = "_compiled_call_impl"


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

    Modules are copied, with the containers and bound methods that refer to them; parameters,
    buffers and every other object are shared. Nothing of the user's runs: not ``train``, which
    subclasses override with side effects, and not ``__deepcopy__``, which fails on process groups
    and on tensors that are not leaves.
    """
    return _Copier().module(model)


class _Copier:
    """Copies modules one by one and remembers which became which."""

    def __init__(self) -> None:
        self._copies: dict[int, nn.Module] = {}
        self._functions: dict[int, FunctionType] = {}

    def module(self, original: nn.Module) -> nn.Module:
        if isinstance(original, torch.jit.ScriptModule):
            return original
        original = unwrap(original)
        if id(original) in self._copies:
            return self._copies[id(original)]
        cls = original_class(original)
        copied = cls.__new__(cls)
        self._copies[id(original)] = copied
        for name, value in original.__dict__.items():
            if not name.startswith(_MARK):
                copied.__dict__[name] = self.value(value)
        copied.__dict__["training"] = False
        copied.__dict__.pop(_COMPILED, None)
        return copied

    def value(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self.module(value)
        kind = type(value)
        if kind in (dict, OrderedDict):
            return kind((key, self.value(one)) for key, one in value.items())
        if kind is defaultdict:
            items = ((key, self.value(one)) for key, one in value.items())
            return defaultdict(value.default_factory, items)
        if kind in (list, tuple, set):
            return kind(self.value(one) for one in value)
        if kind is MethodType and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.module(value.__self__))
        if kind is FunctionType and value.__closure__:
            return self.function(value)
        if kind is functools.partial:
            arguments = map(self.value, value.args)
            keywords = {name: self.value(one) for name, one in value.keywords.items()}
            return functools.partial(self.value(value.func), *arguments, **keywords)
        return value

    def function(self, original: FunctionType) -> FunctionType:
        """A function that closes over modules, as forwards put on an instance and hooks do."""
        if id(original) in self._functions:
            return self._functions[id(original)]
        cells = tuple(CellType() for _ in original.__closure__ or ())
        copied = FunctionType(
            original.__code__,
            original.__globals__,
            original.__name__,
            original.__defaults__,
            cells,
        )
        copied.__kwdefaults__ = original.__kwdefaults__
        copied.__dict__.update(original.__dict__)
        self._functions[id(original)] = copied
        for cell, before in zip(cells, original.__closure__ or (), strict=True):
            # A cell may be empty: its variable was not assigned yet.
            with contextlib.suppress(ValueError):
                cell.cell_contents = self.value(before.cell_contents)
        return copied
