"""Small per-channel steps shared by all kernels that are made of ATen calls."""

import torch
from torch import Tensor

from bnrewrite import reference


def update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    *,
    statistics: tuple[Tensor, Tensor, Tensor],
    momentum: float | None,
    known_nonempty: bool,
) -> None:
    """Moves the running statistics towards those of the batch, in place and without a host read.

        running = (1 - factor) * running + factor * batch

    ``factor`` is the momentum, or ``1 / num_batches_tracked`` (cumulative average) if that is None.
    The running variance gets the unbiased value, ``var * n / (n - 1)``. Nothing changes where no
    rank holds a value.

    Args:
        running_mean: (C,), floating point, or None.
        running_var: (C,), floating point, or None.
        num_batches_tracked: scalar, int64, or None.
        statistics: count (1,), mean (C,) and biased variance (C,), float64, of all ranks together.
        momentum: weight of the new value, or None.
        known_nonempty: this rank holds values, so the total count cannot be zero.
    """
    count, mean, var = statistics
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1 if known_nonempty else count[0] > 0)
    if running_mean is None or running_var is None:
        return
    factor: float | Tensor
    if momentum is not None:
        factor = momentum
    elif num_batches_tracked is not None:
        factor = torch.reciprocal(num_batches_tracked.clamp_min(1).double())
    else:
        return
    if not known_nonempty:
        factor = (count[0] > 0) * factor
    unbiased = var * (count / (count - 1).clamp_min_(1))
    _lerp(running_mean, mean, factor)
    _lerp(running_var, unbiased, factor)


def _lerp(running: Tensor, batch: Tensor, factor: float | Tensor) -> None:
    acc = reference.accumulate_dtype(running.dtype)
    if isinstance(factor, Tensor):
        factor = factor.to(acc)
    if running.dtype == acc:
        running.lerp_(batch.to(acc), factor)
    else:
        # Half-precision running statistics: round once, after the update.
        running.copy_(running.to(acc).lerp_(batch.to(acc), factor))

