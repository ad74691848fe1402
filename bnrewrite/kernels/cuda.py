"""CUDA kernels: the ATen kernels that ``nn.SyncBatchNorm`` is made of, without its host reads.

Bytes per element of x: moments reads x; normalize reads x and writes y; normalize_backward_reduce
reads g and x; normalize_backward reads g and x and writes dx.
"""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels.epilogue import (
    activation_backward_reduce_with,
    add_activation_,
    through_activation,
)
from bnrewrite.kernels.statistics import statistics_table, track


def moments(x: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.moments`."""
    if x.numel() == 0:
        return torch.zeros(2 * x.size(1) + 1, dtype=torch.float64, device=x.device)
    # With eps 0 the inverse standard deviation gives the variance back to rounding.
    mean, invstd = torch.batch_norm_stats(x, 0.0)
    mean = mean.double()
    square = torch.addcmul(invstd.double().pow_(-2), mean, mean)
    return torch.cat([mean.new_ones(1), mean, square]).mul_(x.numel() // x.size(1))


def normalize(
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
    """See :func:`bnrewrite.reference.normalize`; updates the running statistics too."""
    acc = reference.accumulate_dtype(x.dtype)
    running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
    known_nonempty = x.numel() > 0
    table = statistics_table(totals, eps, acc, known_nonempty=known_nonempty)
    track(table, totals, running, known_nonempty=known_nonempty)
    stats = table[:2]
    if not known_nonempty:
        return torch.empty_like(x), stats
    weight = None if weight is None else weight.to(acc)
    bias = None if bias is None else bias.to(acc)
    y = torch.batch_norm_elemt(x, weight, bias, stats[0], stats[1], eps)
    add_activation_(y, residual, activation, slope)
    return y, stats


def normalize_backward_reduce(grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.normalize_backward_reduce`."""
    if x.numel() == 0:
        return torch.zeros(2 * x.size(1), dtype=torch.float64, device=x.device)
    mean, rstd = stats.unbind()
    sum_grad, sum_grad_centered, _, _ = torch.batch_norm_backward_reduce(
        grad, x, mean, rstd, None, True, False, False
    )
    return torch.cat((sum_grad, sum_grad_centered * rstd)).double()


activation_backward_reduce = activation_backward_reduce_with(normalize_backward_reduce)


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
) -> Tensor:
    """See :func:`bnrewrite.reference.normalize_backward`."""
    if x.numel() == 0:
        return torch.empty_like(x)
    grad = through_activation(grad, x, stats, weight, bias, kept, activation, slope)
    mean, rstd = stats.unbind()
    # The kernel divides by the sum of int32 counts, which overflows; the division is done here.
    mean_grad, mean_grad_xhat = (sums / totals[:1]).to(stats.dtype).chunk(2)
    one = torch.ones(1, dtype=torch.int32, device=x.device)
    weight = None if weight is None else weight.to(stats.dtype)
    return torch.batch_norm_backward_elemt(
        grad, x, mean, rstd, weight, mean_grad, mean_grad_xhat / rstd, one
    )
