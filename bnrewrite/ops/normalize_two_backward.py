"""The op ``normalize_two_backward``: the gradients of both inputs of ``normalize_two``."""

from typing import Any

import torch
from torch import Tensor

from bnrewrite import two_branches
from bnrewrite.kernels import cpu, gpu_two_branches
from bnrewrite.ops.library import define_phase


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(args[1]), torch.empty_like(args[7])


NORMALIZE_TWO_BACKWARD = define_phase(
    "normalize_two_backward(Tensor grad, Tensor other, Tensor other_stats, Tensor other_totals, "
    "Tensor? other_weight, Tensor? other_bias, Tensor other_sums, Tensor x, Tensor stats, "
    "Tensor totals, Tensor? weight, Tensor? bias, Tensor sums, str activation, float slope) "
    "-> (Tensor, Tensor)",
    cpu=cpu.normalize_two_backward,
    cuda=gpu_two_branches.normalize_two_backward,
    fake=_fake,
    definition=two_branches.normalize_two_backward,
)
"""See :func:`bnrewrite.two_branches.normalize_two_backward`."""
