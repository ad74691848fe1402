"""The op ``activation_backward_reduce``: ``normalize_backward_reduce`` behind an activation."""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import cpu, gpu
from bnrewrite.ops.library import define_phase


def _fake(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str,
    slope: float,
    write: bool,
) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((2 * x.size(1),), dtype=torch.float64)
    return sums, torch.empty_like(x) if write else x.new_empty(0)


ACTIVATION_BACKWARD_REDUCE = define_phase(
    "activation_backward_reduce(Tensor grad, Tensor x, Tensor stats, Tensor? weight, "
    "Tensor? bias, Tensor? kept, str activation, float slope, bool write) -> (Tensor, Tensor)",
    cpu=cpu.activation_backward_reduce,
    cuda=gpu.activation_backward_reduce,
    fake=_fake,
    definition=reference.activation_backward_reduce,
)
"""See :func:`bnrewrite.reference.activation_backward_reduce`."""
