"""The op ``normalize_two_backward_reduce``: the sums of both inputs of ``normalize_two``."""

from typing import Any

import torch
from torch import Tensor

from bnrewrite import two_branches
from bnrewrite.kernels import cpu, gpu_two_branches
from bnrewrite.ops.library import define_phase


def _fake(grad: Tensor, other: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    sums = [other.new_empty((2 * other.size(1),), dtype=torch.float64) for _ in range(2)]
    return sums[0], sums[1]


NORMALIZE_TWO_BACKWARD_REDUCE = define_phase(
    "normalize_two_backward_reduce(Tensor grad, Tensor other, Tensor other_stats, "
    "Tensor? other_weight, Tensor? other_bias, Tensor x, Tensor stats, Tensor? weight, "
    "Tensor? bias, str activation, float slope) -> (Tensor, Tensor)",
    cpu=cpu.normalize_two_backward_reduce,
    cuda=gpu_two_branches.normalize_two_backward_reduce,
    fake=_fake,
    definition=two_branches.normalize_two_backward_reduce,
)
"""See :func:`bnrewrite.two_branches.normalize_two_backward_reduce`."""
