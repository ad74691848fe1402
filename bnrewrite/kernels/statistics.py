"""From packed sums to statistics and running statistics: the per-channel steps all kernels share.

They run once per site and step on C values, so their cost is the number of calls, not arithmetic.
"""

import torch
from torch import Tensor

from bnrewrite.guards import is_compiling
from bnrewrite.watch import runs_unseen

Running = tuple[Tensor | None, Tensor | None, Tensor | None, float | None, bool]
"""running_mean (C,), running_var (C,), num_batches_tracked (scalar, int64), momentum, and whether a
batch whose statistics are not finite is left out."""


def recomputes() -> bool:
    """Whether a backward pass runs: then activation checkpointing evaluates a forward again.

    Its batch has been tracked by the first evaluation. The kernels ask, since a compiled graph does
    not know when it runs.
    """
    return torch._C._current_graph_task_id() != -1


def statistics_table(
    totals: Tensor, eps: float, acc: torch.dtype, *, known_nonempty: bool
) -> Tensor:
    """Mean, rstd, biased and unbiased variance of packed sums, without a host read.

    Args:
        totals: (2C + 1,), float64, packed sums of all ranks.
        eps: added to the variance.
        acc: dtype of the result.
        known_nonempty: this rank holds values, so the total count cannot be zero.

    Returns:
        (4, C); its first two rows are the ``stats`` that backward needs.
    """
    num_channels = (totals.numel() - 1) // 2
    count = totals[:1]
    divisor = count if known_nonempty else count.clamp_min(1)
    _, mean, square = (totals / divisor).split((1, num_channels, num_channels))
    var = torch.addcmul(square, mean, mean, value=-1).clamp_min_(0)
    unbiased = var * (count / (count - 1).clamp_min_(1))
    return torch.stack((mean, (var + eps).rsqrt_(), var, unbiased)).to(acc)


def track(table: Tensor, totals: Tensor, running: Running, *, known_nonempty: bool) -> None:
    """Moves the running statistics towards those of the batch, in place, without a host read.

        running = (1 - factor) * running + factor * batch

    ``factor`` is the momentum, or ``1 / num_batches_tracked`` (cumulative average) if that is None.
    The running variance gets the unbiased value, ``var * n / (n - 1)``. Nothing changes where no
    rank holds a value, or where activation checkpointing evaluates a batch again.

    Args:
        table: (4, C), of :func:`statistics_table`.
        totals: (2C + 1,), float64, packed sums of all ranks; the first entry is n.
        running: what is tracked, see :data:`Running`.
        known_nonempty: as in :func:`statistics_table`.
    """
    running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite = running
    if recomputes():
        return
    # The sums are those of all ranks, so all of them skip a batch or none does.
    finite = totals.isfinite().all() if skip_nonfinite else None
    if num_batches_tracked is not None:
        counts = 1 if known_nonempty else totals[0] > 0
        num_batches_tracked.add_(counts if finite is None else finite & counts)
    if running_mean is None or running_var is None:
        return
    mean, _, _, unbiased = table.unbind()
    if finite is not None:
        mean = torch.where(finite, mean, running_mean.to(mean.dtype))
        unbiased = torch.where(finite, unbiased, running_var.to(mean.dtype))
    factor = _factor(momentum, num_batches_tracked)
    if not known_nonempty:
        # In float64, as a momentum is: other ranks may know that there are values.
        factor = (totals[0] > 0).double() * factor
    if isinstance(factor, float) and running_mean.dtype == running_var.dtype == table.dtype:
        torch._foreach_lerp_((running_mean, running_var), (mean, unbiased), factor)
    else:
        lerp(running_mean, mean, factor)
        lerp(running_var, unbiased, factor)


def _factor(momentum: float | None, num_batches_tracked: Tensor | None) -> float | Tensor:
    if momentum is not None:
        return momentum
    if num_batches_tracked is None:
        return 0.0
    return num_batches_tracked.clamp_min(1).double().reciprocal_()


def lerp(running: Tensor, batch: Tensor, factor: float | Tensor) -> None:
    """Moves ``running`` towards ``batch`` in place, whatever the dtypes of the two."""
    if running.dtype == batch.dtype:
        running.lerp_(batch, factor.to(batch.dtype) if isinstance(factor, Tensor) else factor)
        return
    # Running statistics of another precision: compute in the wider one and round once.
    wide = torch.promote_types(running.dtype, batch.dtype)
    if isinstance(factor, Tensor):
        factor = factor.to(wide)
    running.copy_(running.to(wide).lerp_(batch.to(wide), factor))


_GRADIENTS = "_bnrewrite_gradients"


def leave_gradients(sums: Tensor, gradients: Tensor) -> None:
    """Keeps ``gradients`` (2C,) for :func:`gradients_of`: ``sums``, as a kernel wrote them, too."""
    setattr(sums, _GRADIENTS, gradients)


def gradients_of(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradients of bias and weight (2C,), in ``dtype``, of the local sums of a backward.

    On a GPU they are never the sums themselves, whose place the sums of all ranks may take.
    """
    # With create_graph they follow from the sums, and a tracer must see that.
    if not (is_compiling() or sums.requires_grad) and runs_unseen(sums):
        gradients = vars(sums).get(_GRADIENTS)
        if gradients is not None and gradients.dtype is dtype:
            return gradients
    return sums.to(dtype, copy=sums.is_cuda)
