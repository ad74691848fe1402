"""The op ``normalize_backward``: the input gradient from the sums of all ranks."""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import cpu, gpu
from bnrewrite.ops.library import define_phase


def _fake(grad: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


NORMALIZE_BACKWARD = define_phase(
    "normalize_backward(Tensor grad, Tensor x, Tensor stats, Tensor totals, Tensor? weight, "
    "Tensor sums, Tensor? bias=None, Tensor? kept=None, str activation='identity', "
    "float slope=0.0) -> Tensor",
    cpu=cpu.normalize_backward,
    cuda=gpu.normalize_backward,
    fake=_fake,
    definition=reference.normalize_backward,
)
"""See :func:`bnrewrite.reference.normalize_backward`."""
