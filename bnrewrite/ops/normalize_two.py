"""The op ``normalize_two``: ``normalize`` whose residual is normalized as well, on the way."""

from typing import Any

import torch
from torch import Tensor

from bnrewrite import reference, two_branches
from bnrewrite.kernels import cpu, gpu_two_branches
from bnrewrite.kernels.epilogue import normalize_two_with
from bnrewrite.ops.library import define_phase
from bnrewrite.ops.normalize import fallback


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = args[10]
    acc = reference.accumulate_dtype(x.dtype)
    stats = [x.new_empty((2, x.size(1)), dtype=acc) for _ in range(2)]
    return torch.empty_like(x), *stats


def _definition(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return two_branches.normalize_two(*args[:5], *args[10:15], *args[20:])


NORMALIZE_TWO = define_phase(
    "normalize_two(Tensor other, Tensor other_totals, Tensor? other_weight, Tensor? other_bias, "
    "float other_eps, Tensor(a!)? other_running_mean, Tensor(b!)? other_running_var, "
    "Tensor(c!)? other_num_batches_tracked, float? other_momentum, bool other_skip_nonfinite, "
    "Tensor x, Tensor totals, Tensor? weight, Tensor? bias, float eps, "
    "Tensor(d!)? running_mean, Tensor(e!)? running_var, Tensor(f!)? num_batches_tracked, "
    "float? momentum, bool skip_nonfinite, str activation, float slope) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=cpu.normalize_two,
    cuda=gpu_two_branches.normalize_two,
    fake=_fake,
    definition=_definition,
    fallback=normalize_two_with(fallback),
)
"""See :func:`bnrewrite.two_branches.normalize_two`. It also moves running statistics, in place."""
