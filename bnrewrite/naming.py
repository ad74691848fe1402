"""What messages call sites, also where only their tensors are known."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

ITSELF = "the model itself"
"""How messages call the module that has no name, since all names are below it."""

_sites: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()


def remember(module: object, name: str) -> None:
    """Notes that the BatchNorm module ``module`` is the site called ``name``."""
    _sites[module] = name


def sites_of(tensors: Iterable[object]) -> str:
    """Names of the sites that hold any of ``tensors``."""
    names = [_sites[module] or ITSELF for module in holders_of(tensors)]
    return ", ".join(dict.fromkeys(names)) or "a BatchNorm site"


def holders_of(tensors: Iterable[object]) -> list[Any]:
    """The sites that hold any of ``tensors``: their modules."""
    wanted = {id(tensor) for tensor in tensors if tensor is not None}
    return [module for module in list(_sites) if not wanted.isdisjoint(map(id, _held(module)))]


def places_of_sites(tensors: Sequence[object]) -> list[int]:
    """Where among ``tensors`` those are that a site holds."""
    held = {id(one) for module in list(_sites) for one in _held(module) if one is not None}
    return [at for at, tensor in enumerate(tensors) if id(tensor) in held]


def holds(module: Any, tensors: tuple[object, ...]) -> bool:
    """Whether ``module`` holds any of ``tensors``, without computing what it is parametrized by."""
    wanted = {id(tensor) for tensor in tensors if tensor is not None}
    return not wanted.isdisjoint(map(id, _held(module)))


def keeps_none(module: Any) -> bool:
    """Whether errors cannot tell ``module`` by its tensors: it has none, or computes one anew."""
    return "parametrizations" in module._modules or all(one is None for one in _held(module))


def _held(module: Any) -> tuple[Any, ...]:
    return (*module._parameters.values(), *module._buffers.values())
