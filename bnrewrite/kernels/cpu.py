"""CPU kernels: compositions of ATen calls that work through cache-sized pieces of the batch.

Fresh tensors of activation size cost more than the arithmetic (the first touch of each page), so
only results are allocated; temporaries are one piece large and reused.

Bytes per element of x, in units of its item size: moments reads x once; normalize reads x and
writes y; normalize_backward_reduce reads g and x; normalize_backward reads g and x and writes dx.
"""

import functools

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels.statistics import finalize

_aten = torch.ops.aten

_PIECE = 1 << 20
"""Values per piece: with its temporaries a piece stays in the last-level cache; smaller pieces
measured slower by the overhead of the calls, larger ones by page faults and cache misses."""

_SMALL = 1 << 15
"""Values below which one slow call costs less than several fast ones."""


def moments(x: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.moments`. Two passes over each piece, both in cache."""
    num_channels = x.size(1)
    if x.numel() == 0:
        return torch.zeros(2 * num_channels + 1, dtype=torch.float64)
    if _has_long_rows(x):
        mean, var = _moments_by_rows(x.flatten(2))
    else:
        # ATen insists on running statistics; with momentum 1 it only writes them.
        unused = torch.empty(num_channels, dtype=reference.accumulate_dtype(x.dtype))
        mean, var = torch.batch_norm_update_stats(x, unused, unused, 1.0)
    packed = torch.cat((_ones(1, mean.dtype), mean, var)).double()
    _, mean, square = packed.split((1, num_channels, num_channels))
    square.addcmul_(mean, mean)
    return packed.mul_(x.numel() // num_channels)


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
) -> tuple[Tensor, Tensor]:
    """See :func:`bnrewrite.reference.normalize`; updates the running statistics too."""
    acc = reference.accumulate_dtype(x.dtype)
    running = (running_mean, running_var, num_batches_tracked, momentum)
    known_nonempty = x.numel() > 0
    stats, var = finalize(totals, eps, acc, running, known_nonempty=known_nonempty)
    if not known_nonempty:
        return torch.empty_like(x), stats
    weight = None if weight is None else weight.to(acc)
    bias = None if bias is None else bias.to(acc)
    return _affine(x, weight, bias, stats[0], var, eps), stats


def normalize_backward_reduce(grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.normalize_backward_reduce`."""
    if x.numel() == 0:
        return torch.zeros(2 * x.size(1), dtype=torch.float64)
    mean, rstd = stats.unbind()
    if _has_long_rows(x):
        sum_grad, sum_grad_centred = _reduce_by_rows(grad.flatten(2), x.flatten(2), mean)
        return torch.cat((sum_grad, sum_grad_centred * rstd))
    # The weight argument matters to the input gradient only, which is not asked for.
    _, sum_grad_xhat, sum_grad = _aten.native_batch_norm_backward(
        grad, x, rstd, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return torch.cat((sum_grad, sum_grad_xhat)).double()


def normalize_backward(
    grad: Tensor, x: Tensor, stats: Tensor, totals: Tensor, weight: Tensor | None, sums: Tensor
) -> Tensor:
    """See :func:`bnrewrite.reference.normalize_backward`.

    With ``scale = weight * rstd`` the gradient is the difference of two affine maps,

        dx = scale * (g - mean_g) - scale * rstd * mean_g_xhat * (x - mean),

    each of which is one call. bfloat16 and float16 round both and the difference. In the
    accumulation dtype the constants are merged and the second map is a multiply-add.
    """
    if x.numel() == 0:
        return torch.empty_like(x)
    acc = stats.dtype
    mean, rstd = stats.unbind()
    mean_grad, mean_grad_xhat = (sums / totals[:1]).to(acc).chunk(2)
    scale = rstd if weight is None else rstd * weight
    slope = rstd * mean_grad_xhat
    if x.dtype == acc:
        offset = torch.addcmul(mean_grad, slope, mean, value=-1)
        slope_x = reference.per_channel(scale * slope, x)
    else:
        offset = mean_grad
        slope_x = scale * slope
    rows_per_piece = max(1, _PIECE * x.size(0) // x.numel())
    if rows_per_piece >= x.size(0) and x.dtype == acc:
        return _affine(grad, scale, None, offset).addcmul_(x, slope_x, value=-1)
    dx = torch.empty_like(x)
    piece = torch.empty_like(x[:rows_per_piece]) if x.dtype != acc else dx
    for start in range(0, x.size(0), rows_per_piece):
        rows = slice(start, start + rows_per_piece)
        out, x_rows = dx[rows], x[rows]
        _affine_out(grad[rows], scale, offset, out)
        if x.dtype == acc:
            out.addcmul_(x_rows, slope_x, value=-1)
        else:
            centred = piece[: out.size(0)]
            _affine_out(x_rows, slope_x, mean, centred)
            out.sub_(centred)
    return dx


@functools.lru_cache(maxsize=64)
def _ones(size: int, dtype: torch.dtype) -> Tensor:
    """Constant ones; they are only read."""
    return torch.ones(size, dtype=dtype)


def _affine(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """``weight * (x - mean) / sqrt(var + eps) + bias`` in one pass, in the dtype of ``x``."""
    if var is None:
        var = _ones(x.size(1), mean.dtype)
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


def _affine_out(x: Tensor, weight: Tensor, mean: Tensor, out: Tensor) -> None:
    """``out = weight * (x - mean)`` in one pass."""
    var, unused = _ones(x.size(1), mean.dtype), _ones(0, mean.dtype)
    torch.native_batch_norm(x, weight, None, mean, var, False, 0.0, 0.0, out=(out, unused, unused))


def _has_long_rows(x: Tensor) -> bool:
    """Whether sums along rows beat ATen's per-channel loops, which are scalar for this layout."""
    return (
        x.dim() > 2
        and x.is_contiguous()
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() >= 16 * x.size(0) * x.size(1)
        and x.numel() >= _SMALL
    )


def _moments_by_rows(x_NCS: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,), float64, from centred rows merged by Chan's formula."""
    N, C, S = x_NCS.shape
    step = max(1, min(N, _PIECE // (C * S)))
    piece = x_NCS.new_empty(step, C, S)
    mean_NC = x_NCS.new_empty(N, C)
    norm_NC = x_NCS.new_empty(N, C)
    for start in range(0, N, step):
        rows = x_NCS[start : start + step]
        row_mean = mean_NC[start : start + step]
        centred = piece[: rows.size(0)]
        torch.mean(rows, 2, out=row_mean)
        torch.sub(rows, row_mean.unsqueeze(2), out=centred)
        torch.linalg.vector_norm(centred, dim=2, out=norm_NC[start : start + step])
    mean_NC = mean_NC.double()
    mean = mean_NC.mean(0)
    m2_NC = norm_NC.double().square_().addcmul_(mean_NC - mean, mean_NC - mean, value=S)
    return mean, m2_NC.sum(0).div_(N * S)


def _reduce_by_rows(grad_NCS: Tensor, x_NCS: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of g and of g * (x - mean), (C,), float64."""
    N, C, S = x_NCS.shape
    step = max(1, min(N, _PIECE // (C * S)))
    piece = x_NCS.new_empty(step, C, S)
    sum_NC = x_NCS.new_empty(N, C)
    dot_NC = x_NCS.new_empty(N, C)
    mean_C1 = mean.unsqueeze(1)
    for start in range(0, N, step):
        rows, grad_rows = x_NCS[start : start + step], grad_NCS[start : start + step]
        product = piece[: rows.size(0)]
        torch.sum(grad_rows, 2, out=sum_NC[start : start + step])
        torch.sub(rows, mean_C1, out=product)
        product.mul_(grad_rows)
        torch.sum(product, 2, out=dot_NC[start : start + step])
    return sum_NC.double().sum(0), dot_NC.double().sum(0)
