"""Which site a tensor belongs to, for errors raised where only tensors are known."""

import weakref
from typing import Any

_sites: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()

TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""Names under which a BatchNorm module holds tensors."""


def remember(module: object, name: str) -> None:
    """Notes that the BatchNorm module ``module`` is the site called ``name``."""
    _sites[module] = name


def site_of(tensors: tuple[object, ...]) -> str:
    """Name of the site that holds one of ``tensors``."""
    for module, name in list(_sites.items()):
        own = [getattr(module, tensor, None) for tensor in TENSORS]
        if any(mine is not None and mine is its for mine in own for its in tensors):
            return name or "the model itself"
    return "a BatchNorm site without parameters and buffers of its own"
