"""The op ``normalize``: finalises the statistics, updates the running ones and normalizes.

A residual and an activation are part of it.
"""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import cpu, gpu
from bnrewrite.kernels.statistics import statistics_table, track
from bnrewrite.ops.library import define_phase


def fallback(
    x: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool = False,
    residual: Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """For devices without a kernel: the definition, after the running statistics have moved."""
    running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
    known_nonempty = x.numel() > 0
    table = statistics_table(totals, eps, torch.float64, known_nonempty=known_nonempty)
    track(table, totals, running, known_nonempty=known_nonempty)
    return reference.normalize(x, totals, weight, bias, eps, residual, activation, slope)


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    acc = reference.accumulate_dtype(x.dtype)
    return torch.empty_like(x), x.new_empty((2, x.size(1)), dtype=acc)


def _definition(
    x: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running_mean: None = None,
    running_var: None = None,
    num_batches_tracked: None = None,
    momentum: float | None = None,
    skip_nonfinite: bool = False,
    residual: Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return reference.normalize(x, totals, weight, bias, eps, residual, activation, slope)


NORMALIZE = define_phase(
    "normalize(Tensor x, Tensor totals, Tensor? weight, Tensor? bias, float eps, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float? momentum, bool skip_nonfinite=False, Tensor? residual=None, "
    "str activation='identity', float slope=0.0) -> (Tensor, Tensor)",
    cpu=cpu.normalize,
    cuda=gpu.normalize,
    fake=_fake,
    definition=_definition,
    fallback=fallback,
)
"""See :func:`bnrewrite.reference.normalize`. It also moves the running statistics, in place."""
