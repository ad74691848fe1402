"""CPU kernels of a whole BatchNorm, for sites that share statistics with nobody.

ATen's own kernels, once each way, but where the phases of :mod:`bnrewrite.kernels.cpu` are faster:
with long rows in float32, which ATen walks with scalar loops. float64 is left to ATen, which does
not pack its sums: a large mean costs no digits.

Bytes per element of x, in units of its item size: forward reads x twice and writes y; backward
reads g and x twice and writes dx.
"""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import aten, cpu, native
from bnrewrite.kernels.statistics import lerp, recomputes

_aten = torch.ops.aten

LEAST = 160_000
"""Values that pay for the calls by which ATen's phases differ from one call of its kernel."""

LEAST_IN_C = 100_000
"""The same for phases in C."""


def batch_norm_local(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`bnrewrite.reference.batch_norm_local`; updates the running statistics too."""
    acc = reference.accumulate_dtype(x.dtype)
    if x.numel() == 0:
        zero = torch.zeros(x.size(1), dtype=acc)
        return torch.empty_like(x), zero, torch.full_like(zero, eps).rsqrt_()
    if recomputes():
        running_mean = running_var = num_batches_tracked = None
    if _goes_by_phases(x) or skip_nonfinite:
        running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
        y, stats = cpu.normalize(x, cpu.moments(x), weight, bias, eps, *running)
        # Results of an op share no memory.
        return y, stats[0].clone(), stats[1].clone()
    factor = _count(momentum, num_batches_tracked)
    weight, bias = _as(acc, weight), _as(acc, bias)
    if running_mean is None or running_var is None:
        if weight is None and bias is None and acc != x.dtype:
            # Without any argument in it, ATen would round the statistics to the dtype of x.
            weight = aten.ones(x.size(1), acc)
        return _aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    if running_mean.dtype == running_var.dtype == acc:
        return _aten.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, factor, eps
        )
    # Running statistics of another precision: with momentum 1 ATen writes those of the batch.
    batch = torch.zeros(2, x.size(1), dtype=acc)
    results = _aten.native_batch_norm(x, weight, bias, batch[0], batch[1], True, 1.0, eps)
    lerp(running_mean, batch[0], factor)
    lerp(running_var, batch[1], factor)
    return results


def _goes_by_phases(x: Tensor) -> bool:
    """Whether a forward by phases is faster, and as exact."""
    if native.takes(x):
        return _goes_by_c(x)
    return x.dtype != torch.float64 and aten.has_long_rows(x, least=LEAST)


def _goes_by_c(x: Tensor) -> bool:
    """Whether both directions by phases in C are faster, and as exact."""
    return (
        x.dtype != torch.float64
        and aten.walks_rows(x)
        and x.numel() >= LEAST_IN_C
        and native.takes(x)
    )


def _count(momentum: float | None, num_batches_tracked: Tensor | None) -> float:
    """Weight of this batch in the running statistics, after counting it."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is not None:
        return momentum
    # Reading a CPU tensor waits for nothing.
    return 0.0 if num_batches_tracked is None else 1 / max(int(num_batches_tracked), 1)


def _as(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def batch_norm_local_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`bnrewrite.reference.batch_norm_local_backward`."""
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
    if _goes_by_c(x):
        stats = torch.stack([mean, rstd])
        sums = cpu.normalize_backward_reduce(grad, x, stats)
        count = torch.tensor([x.numel() // x.size(1)], dtype=torch.float64)
        dx = cpu.normalize_backward(grad, x, stats, count, weight, sums)
        grad_bias, grad_weight = sums.chunk(2)
        return dx, grad_weight.to(mean.dtype, copy=True), grad_bias.to(mean.dtype, copy=True)
    # eps is inside of rstd already.
    return _aten.native_batch_norm_backward(
        grad, x, _as(mean.dtype, weight), None, None, mean, rstd, True, 0.0, [True, True, True]
    )
