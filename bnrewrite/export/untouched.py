"""What can be reached from a module, put back after code has run that may change it."""

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinMethodType, CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnrewrite.capture.restore import slots_of
from bnrewrite.capture.values import CONSTANTS, MISSING, holds_data, is_library
from bnrewrite.export.plain import WEAK, is_of_user, referent


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts what ``model`` holds, and torch's random state, back at the end.

    Modules, containers, objects of the user's classes, variables of closures, arrays and tensors
    are followed wherever the model refers to them. Not covered are values of parameters that are
    changed in place (copies would double the memory), gradients, what classes and globals hold,
    and what lies in generators, files and objects of libraries.
    """
    state = _State(model)
    with torch.random.fork_rng(state.devices):
        try:
            yield
        finally:
            state.give_back()


class _State:
    """What everything holds that can be reached from a module."""

    def __init__(self, model: nn.Module) -> None:
        # By identity; what is here is kept alive, so that numbers stay those of one object.
        self._seen: dict[int, Any] = {}
        self._undo: list[Callable[[], object]] = []
        self._tensors: list[Tensor] = []
        waiting: list[Any] = [model]
        while waiting:
            value = waiting.pop()
            if type(value) not in _CONSTANTS and id(value) not in self._seen:
                self._seen[id(value)] = value
                waiting.extend(self._keep(value))
        self._undo += _kept_memory(self._tensors)
        self.devices = sorted({one.device.index for one in self._tensors if one.is_cuda})

    def give_back(self) -> None:
        """Gives everything back what it held; what holds the same is not written to."""
        for undo in self._undo:
            undo()

    def _keep(self, value: Any) -> Iterable[Any]:
        """Notes what ``value`` holds, and returns it."""
        if type(value) in WEAK:
            return (referent(value),)
        if isinstance(value, Tensor):
            if _has_memory(value):
                self._tensors.append(value)
                self._undo.append(functools.partial(_place_again, value, value.data, _place(value)))
            return (value.__dict__,)
        if isinstance(value, np.ndarray):
            if value.flags.writeable:
                self._undo.append(functools.partial(_fill_array, value, value.copy()))
            return ()
        if isinstance(value, torch.Generator):
            self._undo.append(functools.partial(value.set_state, value.get_state()))
            return ()
        if isinstance(value, MethodType):
            return value.__self__, value.__func__
        if isinstance(value, BuiltinMethodType):
            return (value.__self__,)
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        if isinstance(value, FunctionType):
            cells = () if is_library(value.__module__) else value.__closure__ or ()
            return *cells, value.__defaults__, value.__kwdefaults__, value.__dict__
        if isinstance(value, CellType):
            return self._keep_cell(value)
        return *self._keep_elements(value), *self._keep_attributes(value)

    def _keep_cell(self, cell: CellType) -> Iterable[Any]:
        try:
            contents = cell.cell_contents
        except ValueError:
            # Its variable was not assigned yet.
            return ()
        self._undo.append(functools.partial(setattr, cell, "cell_contents", contents))
        return (contents,)

    def _keep_elements(self, value: Any) -> Iterable[Any]:
        base = next((one for one in _FILLS if isinstance(value, one)), None)
        if base is None:
            return tuple(value) if isinstance(value, (tuple, frozenset)) else ()
        # Methods of the base, because those of the user's classes may do something else.
        elements = dict(base.items(value)) if issubclass(base, dict) else list(base.__iter__(value))
        self._undo.append(functools.partial(_FILLS[base], base, value, elements))
        return elements.values() if isinstance(elements, dict) else elements

    def _keep_attributes(self, value: Any) -> Iterable[Any]:
        if type(value) in _BARE:
            return ()
        has_attributes = isinstance(value, (nn.Module, SimpleNamespace)) or holds_data(type(value))
        if not (has_attributes or is_of_user(value)):
            return ()
        slots = slots_of(value)
        if slots:
            self._undo.append(functools.partial(_fill_slots, value, slots))
        attributes = getattr(value, "__dict__", None)
        return (attributes, *slots.values()) if isinstance(attributes, dict) else slots.values()


_CONSTANTS = frozenset(CONSTANTS)
_BARE = frozenset((dict, collections.OrderedDict, list, tuple, set, frozenset, collections.deque))


def _fill_dict(base: Any, value: Any, before: dict[Any, Any]) -> None:
    # Never empty: it may be what a module holds, which other threads read.
    for key in [key for key in base.keys(value) if key not in before]:
        base.__delitem__(value, key)
    for key, one in before.items():
        if base.get(value, key, MISSING) is not one:
            base.__setitem__(value, key, one)
    if list(base.keys(value)) != list(before):
        for key in before:
            base.__setitem__(value, key, base.pop(value, key))


def _fill_list(base: Any, value: Any, before: list[Any]) -> None:
    if not _identical(base.__iter__(value), before):
        base.__setitem__(value, slice(None), before)


def _fill_other(base: Any, value: Any, before: list[Any]) -> None:
    if not _identical(base.__iter__(value), before):
        base.clear(value)
        (base.update if base is set else base.extend)(value, before)


_FILLS: dict[type, Callable[[Any, Any, Any], None]] = {
    collections.OrderedDict: _fill_dict,
    dict: _fill_dict,
    list: _fill_list,
    set: _fill_other,
    collections.deque: _fill_other,
}


def _identical(now: Iterable[Any], before: list[Any]) -> bool:
    return all(one is other for one, other in itertools.zip_longest(now, before, fillvalue=MISSING))


def _fill_slots(value: Any, before: dict[str, Any]) -> None:
    now = slots_of(value)
    for name in now.keys() - before.keys():
        object.__delattr__(value, name)
    for name, one in before.items():
        if now.get(name, MISSING) is not one:
            object.__setattr__(value, name, one)


def _fill_array(array: np.ndarray, before: np.ndarray) -> None:
    if array.tobytes() != before.tobytes():
        array[...] = before


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is dense and holds its values itself, as fake and sharded ones do not."""
    is_wrapper = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return tensor.layout is torch.strided and not tensor.is_meta and not is_wrapper


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _place_again(tensor: Tensor, before: Tensor, place: tuple[Any, ...]) -> None:
    """Undoes ``tensor.data = ...``; ``before`` is another tensor of the same memory."""
    if _place(tensor) != place:
        tensor.data = before


def _kept_memory(tensors: list[Tensor]) -> list[Callable[[], object]]:
    """What puts the values of all tensors back, each piece of memory once, but parameters."""
    storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in tensors}
    for tensor in tensors:
        if isinstance(tensor, nn.Parameter):
            storages.pop(tensor.untyped_storage()._cdata, None)
    return [functools.partial(_fill_memory, one, one.clone()) for one in storages.values()]


def _fill_memory(storage: torch.UntypedStorage, before: torch.UntypedStorage) -> None:
    if storage.nbytes() != before.nbytes():
        storage.resize_(before.nbytes())
    # As bytes, of which NaN equals itself. A copy of memory counts no version of a tensor, and
    # takes tensors of inference mode, and those that overlap themselves.
    if not torch.equal(_bytes(storage), _bytes(before)):
        storage.copy_(before)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore
