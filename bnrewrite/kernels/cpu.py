"""CPU kernels: compositions of ATen calls that work through cache-sized pieces of the batch.

Fresh tensors of activation size cost more than the arithmetic (the first touch of each page), so
only results are allocated; temporaries are one piece large and reused.

Bytes per element of x, in units of its item size: moments reads x once; normalize reads x and
writes y; normalize_backward_reduce reads g and x; normalize_backward reads g and x and writes dx.
"""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels.running import update_running_statistics

_aten = torch.ops.aten
_apply = _aten.native_batch_norm.default
_apply_out = _aten.native_batch_norm.out

_PIECE = 1 << 20
"""Values per piece: with its temporaries a piece stays in the last-level cache; smaller pieces
measured slower by the overhead of the calls, larger ones by page faults and cache misses."""


def moments(x: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.moments`. Two passes over each piece, both in cache."""
    if x.numel() == 0:
        return torch.zeros(2 * x.size(1) + 1, dtype=torch.float64)
    num_values = x.numel() // x.size(1)
    if _has_long_rows(x):
        mean, var = _moments_by_rows(x.flatten(2))
    else:
        one = torch.ones(x.size(1), dtype=reference.accumulate_dtype(x.dtype))
        # With momentum 1 the running statistics are only written: ATen insists on having them.
        mean, var = _aten.batch_norm_update_stats(x, torch.zeros_like(one), one, 1.0)
        mean, var = mean.double(), var.double()
    square = torch.addcmul(var, mean, mean)
    packed = torch.cat([mean.new_ones(1), mean, square])
    return packed.mul_(num_values)


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
    statistics = reference.finalize(totals)
    _, mean64, var64 = statistics
    update_running_statistics(
        running_mean,
        running_var,
        num_batches_tracked,
        statistics=statistics,
        momentum=momentum,
        known_nonempty=x.numel() > 0,
    )
    stats = torch.stack((mean64, (var64 + eps).rsqrt_())).to(acc)
    if x.numel() == 0:
        return torch.empty_like(x), stats
    mean, rstd = stats.unbind()
    scale = rstd if weight is None else rstd * weight
    one = torch.ones_like(mean)
    shift = None if bias is None else bias.to(acc)
    return _apply(x, scale, shift, mean, one, False, 0.0, 0.0)[0], stats


def normalize_backward_reduce(grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.normalize_backward_reduce`."""
    if x.numel() == 0:
        return torch.zeros(2 * x.size(1), dtype=torch.float64)
    mean, rstd = stats.unbind()
    if _has_long_rows(x):
        sum_grad, sum_grad_centred = _reduce_by_rows(grad.flatten(2), x.flatten(2), mean)
        return torch.cat((sum_grad, sum_grad_centred * rstd))
    _, sum_grad_xhat, sum_grad = _aten.native_batch_norm_backward(
        grad, x, torch.ones_like(mean), None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return torch.cat((sum_grad, sum_grad_xhat)).double()


def normalize_backward(
    grad: Tensor, x: Tensor, stats: Tensor, totals: Tensor, weight: Tensor | None, sums: Tensor
) -> Tensor:
    """See :func:`bnrewrite.reference.normalize_backward`.

    With ``scale = weight * rstd`` the gradient is the difference of two affine maps, of g and of x,
    each of which is one call; bfloat16 and float16 round each of them and the difference.
    """
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    mean, rstd = stats.unbind()
    mean_grad, mean_grad_xhat = (sums / totals[:1]).to(stats.dtype).chunk(2)
    scale = rstd if weight is None else rstd * weight
    slope = scale * rstd * mean_grad_xhat
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    rows_per_piece = max(1, _PIECE * x.size(0) // x.numel())
    unused = torch.empty(0, dtype=stats.dtype)
    low_precision = x.dtype != stats.dtype
    if low_precision:
        piece = torch.empty_like(x[:rows_per_piece])
        slope_x = slope
    else:
        # In the accumulation dtype the second map can be folded into the first one's offset.
        mean_grad = mean_grad - rstd * mean_grad_xhat * mean
        piece = dx
        slope_x = reference.per_channel(slope, x)
    for start in range(0, x.size(0), rows_per_piece):
        rows = slice(start, start + rows_per_piece)
        out, x_rows = dx[rows], x[rows]
        _apply_out(
            grad[rows], scale, None, mean_grad, one, False, 0.0, 0.0,
            out=out, save_mean=unused, save_invstd=unused,
        )  # fmt: skip
        if low_precision:
            other = piece[: out.size(0)]
            _apply_out(
                x_rows, slope_x, zero, mean, one, False, 0.0, 0.0,
                out=other, save_mean=unused, save_invstd=unused,
            )  # fmt: skip
            out.sub_(other)
        else:
            out.addcmul_(x_rows, slope_x, value=-1)
    return dx


def _has_long_rows(x: Tensor) -> bool:
    """Whether sums along rows beat ATen's per-channel loops, which are scalar for this layout."""
    return (
        x.dim() > 2
        and x.is_contiguous()
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() >= 16 * x.size(0) * x.size(1)
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
