"""From packed sums to statistics and running statistics: the per-channel steps all kernels share.

They run once per site and step on C values, so their cost is the number of calls, not arithmetic.
"""

import torch
from torch import Tensor

Running = tuple[Tensor | None, Tensor | None, Tensor | None, float | None]
"""running_mean (C,), running_var (C,), num_batches_tracked (scalar, int64), momentum."""


def finalize(
    totals: Tensor, eps: float, acc: torch.dtype, running: Running, *, known_nonempty: bool
) -> tuple[Tensor, Tensor]:
    """Statistics of packed sums; moves the running statistics towards them, in place.

        running = (1 - factor) * running + factor * batch

    ``factor`` is the momentum, or ``1 / num_batches_tracked`` (cumulative average) if that is None.
    The running variance gets the unbiased value, ``var * n / (n - 1)``. Nothing changes where no
    rank holds a value. There is no host read.

    Args:
        totals: (2C + 1,), float64, packed sums of all ranks.
        eps: added to the variance.
        acc: dtype of the results.
        running: what is tracked, see :data:`Running`.
        known_nonempty: this rank holds values, so the total count cannot be zero.

    Returns:
        stats (2, C): mean and rstd; var (C,): the biased variance.
    """
    num_channels = (totals.numel() - 1) // 2
    count = totals[:1]
    divisor = count if known_nonempty else count.clamp_min(1)
    _, mean, square = (totals / divisor).split((1, num_channels, num_channels))
    var = torch.addcmul(square, mean, mean, value=-1).clamp_min_(0)
    unbiased = var * (count / (count - 1).clamp_min_(1))
    table = torch.stack((mean, (var + eps).rsqrt_(), var, unbiased)).to(acc)
    mean, _, var, unbiased = table.unbind()
    running_mean, running_var, num_batches_tracked, momentum = running
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1 if known_nonempty else count[0] > 0)
    if running_mean is not None and running_var is not None:
        factor = _factor(momentum, num_batches_tracked, acc)
        if not known_nonempty:
            factor = (count[0] > 0).to(acc) * factor
        if isinstance(factor, float) and running_mean.dtype == running_var.dtype == acc:
            torch._foreach_lerp_((running_mean, running_var), (mean, unbiased), factor)
        else:
            _lerp(running_mean, mean, factor)
            _lerp(running_var, unbiased, factor)
    return table[:2], var


def _factor(
    momentum: float | None, num_batches_tracked: Tensor | None, acc: torch.dtype
) -> float | Tensor:
    if momentum is not None:
        return momentum
    if num_batches_tracked is None:
        return 0.0
    return num_batches_tracked.clamp_min(1).to(acc).reciprocal_()


def _lerp(running: Tensor, batch: Tensor, factor: float | Tensor) -> None:
    if running.dtype == batch.dtype:
        running.lerp_(batch, factor)
        return
    # Running statistics of another precision: compute in the wider one and round once.
    wide = torch.promote_types(running.dtype, batch.dtype)
    if isinstance(factor, Tensor):
        factor = factor.to(wide)
    running.copy_(running.to(wide).lerp_(batch.to(wide), factor))
