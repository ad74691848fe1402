"""Which sites tensors belong to, for errors raised where only tensors are known."""

import weakref
from typing import Any

_sites: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()

_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""Names under which a BatchNorm module holds tensors."""


def remember(module: object, name: str) -> None:
    """Notes that the BatchNorm module ``module`` is the site called ``name``."""
    _sites[module] = name


def sites_of(tensors: tuple[object, ...]) -> str:
    """Names of the sites that hold any of ``tensors``."""
    wanted = {id(tensor) for tensor in tensors if tensor is not None}
    names = [
        name or "the model itself"
        for module, name in list(_sites.items())
        if any(id(getattr(module, tensor, None)) in wanted for tensor in _TENSORS)
    ]
    return ", ".join(dict.fromkeys(names)) or "a BatchNorm site"
