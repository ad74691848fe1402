"""The op ``normalize_backward_reduce``: sums of the output gradient over one rank's batch."""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import cpu, gpu
from bnrewrite.ops.library import define_phase


def _fake(grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    return x.new_empty((2 * x.size(1),), dtype=torch.float64)


NORMALIZE_BACKWARD_REDUCE = define_phase(
    "normalize_backward_reduce(Tensor grad, Tensor x, Tensor stats) -> Tensor",
    cpu=cpu.normalize_backward_reduce,
    cuda=gpu.normalize_backward_reduce,
    fake=_fake,
    definition=reference.normalize_backward_reduce,
)
"""See :func:`bnrewrite.reference.normalize_backward_reduce`."""
