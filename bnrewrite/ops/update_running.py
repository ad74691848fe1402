"""The op ``update_running``: moves running statistics, where ``normalize`` uses other totals."""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels.statistics import statistics_table, track
from bnrewrite.ops.library import define_phase


def _update_running(
    totals: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool = False,
) -> None:
    acc = reference.accumulate_dtype(torch.float32 if running_mean is None else running_mean.dtype)
    running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
    # eps is for the rstd only, which is not used here.
    table = statistics_table(totals, 0.0, acc, known_nonempty=False)
    track(table, totals, running, known_nonempty=False)


def _fake(*_: object) -> None:
    return None


def _definition(*_: object) -> tuple[()]:
    return ()


UPDATE_RUNNING = define_phase(
    "update_running(Tensor totals, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float? momentum, "
    "bool skip_nonfinite=False) -> ()",
    cpu=_update_running,
    cuda=_update_running,
    fake=_fake,
    definition=_definition,
    fallback=_update_running,
)
"""See :func:`bnrewrite.kernels.statistics.track`."""
