"""What messages call sites, also where only their tensors are known."""

import weakref
from typing import Any

ITSELF = "the model itself"
"""How messages call the module that has no name, since all names are below it."""

_sites: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()


def remember(module: object, name: str) -> None:
    """Notes that the BatchNorm module ``module`` is the site called ``name``."""
    _sites[module] = name


def sites_of(tensors: tuple[object, ...]) -> str:
    """Names of the sites that hold any of ``tensors``."""
    names = [name or ITSELF for module, name in list(_sites.items()) if holds(module, tensors)]
    return ", ".join(dict.fromkeys(names)) or "a BatchNorm site"


def holds(module: Any, tensors: tuple[object, ...]) -> bool:
    """Whether ``module`` holds any of ``tensors``, without computing what it is parametrized by."""
    wanted = {id(tensor) for tensor in tensors if tensor is not None}
    held = (*module._parameters.values(), *module._buffers.values())
    return any(id(one) in wanted for one in held)


def keeps_none(module: Any) -> bool:
    """Whether errors cannot tell ``module`` by its tensors: it has none, or computes one anew."""
    held = (*module._parameters.values(), *module._buffers.values())
    return "parametrizations" in module._modules or all(one is None for one in held)
