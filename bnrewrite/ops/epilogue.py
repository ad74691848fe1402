"""What follows a site: whether the phases take it, and what it is where they do not."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnrewrite import activations
from bnrewrite.groups import NO_GROUP
from bnrewrite.ops import sites
from bnrewrite.ops.library import knows_only_torch


def joins_phases(x: Tensor, residual: Tensor | None, activation: str, group: str) -> bool:
    """Whether the phases can do all of it, without a copy, and faster than separate ops."""
    if group == NO_GROUP and (not sites.prefers_recomputing(x) or knows_only_torch()):
        # There one op does without phases what ``batch_norm`` has to do.
        return False
    if residual is not None:
        same = residual.shape == x.shape and residual.dtype == x.dtype
        if not (same and residual.device == x.device and x.dim() >= 2):
            return False
        # The strides of a sum are those of its first operand where the two differ.
        if not residual.is_contiguous(memory_format=sites.memory_format(x)):
            return False
    # Of other activations torch keeps the argument, which costs memory traffic.
    return activations.torch_keeps_result(activation) or sites.prefers_recomputing(x)


def addend(value: Any) -> Tensor:
    """What a child gave that is added to a result, as a tensor: it may be a number.

    As a scalar in the widest dtype of its kind it changes results as a number does.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (int, float, complex, np.generic)):
        wide = isinstance(value, float)
        return torch.tensor(value, dtype=torch.float64 if wide else None)
    raise TypeError(
        f"unsupported operand type(s) for +: 'Tensor' and {type(value).__name__!r}. If the model "
        "works without bnrewrite, leave out the pass fuse_epilogue."
    )


def compose(
    y: Tensor, residual: Tensor | None, activation: str, slope: float, into: str = "new"
) -> Tensor:
    """``act(y + residual)`` by torch's own ops, into the fresh ``y`` where that changes nothing.

    ``into`` is where the sum goes: "new", "own" (into ``y``) or "other" (into ``residual``), which
    decides about its dtype, and about its shape.
    """
    if residual is not None:
        y = _sum(y, residual, into)
    if not activations.torch_keeps_result(activation):
        return activations.activate(y, activation, slope)
    activations.activate_(y, activation, slope)
    return y


def _sum(y: Tensor, residual: Tensor, into: str) -> Tensor:
    if into == "other":
        return residual.add_(y)
    fits = residual.shape == y.shape and residual.dtype == y.dtype
    in_place = into == "own" or (fits and residual.stride() == y.stride())
    return y.add_(residual) if in_place else y + residual
