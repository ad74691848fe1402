"""The op ``shuffle_backward``: the input gradient where ranks borrow each other's statistics."""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import cpu, gpu
from bnrewrite.kernels.shuffle import shuffle_backward_with
from bnrewrite.ops.library import define_phase


def _fake(grad: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


SHUFFLE_BACKWARD = define_phase(
    "shuffle_backward(Tensor grad, Tensor x, Tensor stats, Tensor own, Tensor? weight, "
    "Tensor? sums, float eps) -> Tensor",
    cpu=shuffle_backward_with(cpu.normalize_backward),
    cuda=shuffle_backward_with(gpu.normalize_backward),
    fake=_fake,
    definition=reference.shuffle_backward,
)
"""See :func:`bnrewrite.reference.shuffle_backward`."""
