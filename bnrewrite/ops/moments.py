"""The op ``moments``: count, sum and sum of squares per channel of one rank's batch."""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import cpu, gpu
from bnrewrite.ops.library import define_phase


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((2 * x.size(1) + 1,), dtype=torch.float64)


MOMENTS = define_phase(
    "moments(Tensor x) -> Tensor",
    cpu=cpu.moments,
    cuda=gpu.moments,
    fake=_fake,
    definition=reference.moments,
)
"""See :func:`bnrewrite.reference.moments`."""
