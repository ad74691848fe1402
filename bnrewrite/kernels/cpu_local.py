"""CPU kernels of a whole BatchNorm, for sites that share statistics with nobody.

ATen's own kernels, once each way, but where the chunked phases of :mod:`bnrewrite.kernels.cpu`
are faster: with long rows in float32 and float64, which ATen walks with scalar loops.

Bytes per element of x, in units of its item size: forward reads x twice and writes y; backward
reads g and x twice and writes dx.
"""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import cpu
from bnrewrite.kernels.statistics import lerp, recomputes

_aten = torch.ops.aten

LEAST = 160_000
"""Values that pay for the calls by which the phases differ from one call of ATen's kernel."""


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
    if cpu.has_long_rows(x, least=LEAST) or skip_nonfinite:
        running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
        y, stats = cpu.normalize(x, cpu.moments(x), weight, bias, eps, *running)
        # Results of an op share no memory.
        return y, stats[0].clone(), stats[1].clone()
    factor = _count(momentum, num_batches_tracked)
    weight, bias = _as(acc, weight), _as(acc, bias)
    if running_mean is None or running_var is None:
        if weight is None and bias is None and acc != x.dtype:
            # Without any argument in it, ATen would round the statistics to the dtype of x.
            weight = cpu.ones(x.size(1), acc)
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
    # eps is inside of rstd already.
    return _aten.native_batch_norm_backward(
        grad, x, _as(mean.dtype, weight), None, None, mean, rstd, True, 0.0, [True, True, True]
    )
