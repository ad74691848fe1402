"""Values that the code of a graph can spell."""

import enum
from typing import Any

import numpy as np
import torch
from torch import fx

PLAIN_TYPES = frozenset((bool, int, float, str, type(None)))


def literal(value: Any) -> Any:
    """A number or text of a class of its own as what it is, since code spells it; else None.

    numpy's float64 is one, and torch takes it for the float that it is.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, enum.Enum):
        return None
    for cls in (float, int, str):
        if isinstance(value, cls):
            return value if type(value) in PLAIN_TYPES else cls(value)
    return None


CONTAINERS = (
    dict, list, tuple, torch.Size, fx.immutable_collections.immutable_dict,
    fx.immutable_collections.immutable_list,
)  # fmt: skip
