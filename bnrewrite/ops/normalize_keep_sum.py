"""The op ``normalize_keep_sum``: ``normalize`` that also gives what it activates.

Torch keeps the sum before an activation for the backward. So does this, where only the sum tells
the derivative: whoever changes the residual or the result in place afterwards changes nothing.
"""

from typing import Any

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import cpu, gpu
from bnrewrite.kernels.epilogue import normalize_keep_sum_with
from bnrewrite.ops.library import define_phase
from bnrewrite.ops.normalize import fallback


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = reference.accumulate_dtype(x.dtype)
    return torch.empty_like(x), x.new_empty((2, x.size(1)), dtype=acc), torch.empty_like(x)


def _definition(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return reference.normalize_keep_sum(*args[:5], *args[10:])


NORMALIZE_KEEP_SUM = define_phase(
    "normalize_keep_sum(Tensor x, Tensor totals, Tensor? weight, Tensor? bias, float eps, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float? momentum, bool skip_nonfinite, Tensor residual, str activation, float slope) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=cpu.normalize_keep_sum,
    cuda=gpu.normalize_keep_sum,
    fake=_fake,
    definition=_definition,
    fallback=normalize_keep_sum_with(fallback),
)
"""See :func:`bnrewrite.reference.normalize_keep_sum`. It also moves the running statistics."""
