"""CPU kernels made of ATen calls, which work through cache-sized pieces of the batch.

Fresh tensors of activation size cost more than the arithmetic (the first touch of each page), so
only results are allocated; temporaries are one piece large and reused.

Bytes per element of x, in units of its item size: moments reads x once; normalize reads x and
writes y; normalize_backward_reduce reads g and x; normalize_backward reads g and x and writes dx.
"""

import functools

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels import channels, native
from bnrewrite.kernels.epilogue import (
    activation_backward_reduce_with,
    add_activation_,
    through_activation,
)
from bnrewrite.kernels.statistics import Running, track

_aten = torch.ops.aten

_PIECE = 1 << 20
"""Values per piece: with its temporaries a piece stays in cache. Smaller pieces measured slower by
the overhead of the calls."""

_REDUCE_PIECE = 1 << 19
"""Values per piece of a reduction over contiguous images. ATen walks them channel by channel, and
few images at a time keep what it jumps between in cache."""

_SMALL = 1 << 15
"""Values below which one slow call costs less than several fast ones."""


def moments(x: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.moments`. Two passes over each piece, both in cache."""
    num_channels = x.size(1)
    if x.numel() == 0:
        return torch.zeros(2 * num_channels + 1, dtype=torch.float64)
    if has_long_rows(x):
        return _moments_by_rows(x.flatten(2))
    # ATen insists on running statistics; with momentum 1 it only writes them.
    unused = torch.empty(num_channels, dtype=reference.accumulate_dtype(x.dtype))
    mean, var = torch.batch_norm_update_stats(x, unused, unused, 1.0)
    return channels.pack(mean.numpy(), var.numpy(), x.numel() // num_channels)


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
    stats, var = _statistics(totals, eps, acc, running, known_nonempty=known_nonempty)
    if not known_nonempty:
        return torch.empty_like(x), stats
    weight = None if weight is None else weight.to(acc)
    bias = None if bias is None else bias.to(acc)
    if residual is None and activation == "identity":
        return _affine(x, torch.empty_like(x), weight, bias, stats, var, eps), stats
    y = torch.empty_like(x)
    step = max(1, _PIECE * x.size(0) // x.numel())
    for start in range(0, x.size(0), step):
        rows = slice(start, start + step)
        out = _affine(x[rows], y[rows], weight, bias, stats, var, eps)
        add_activation_(out, None if residual is None else residual[rows], activation, slope)
    return y, stats


def _statistics(
    totals: Tensor, eps: float, acc: torch.dtype, running: Running, *, known_nonempty: bool
) -> tuple[Tensor, Tensor]:
    """Mean and rstd, (2, C), and biased variance (C) in ``acc``; moves the running statistics.

    In C if it can be, since other ranks do so, whose tensors are laid out otherwise or not empty:
    other arithmetic would give their running statistics other last bits.
    """
    found = native.statistics(totals, eps, acc, running)
    if found is not None:
        return found
    table = channels.statistics_table(totals, eps, acc)
    track(table, totals, running, known_nonempty=known_nonempty)
    return table[:2], table[2]


def _affine(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """Normalizes ``x`` into ``y``."""
    if x.dtype == stats.dtype and _channels_vectorize(x):
        scale = stats[1] if weight is None else stats[1] * weight
        offset = torch.mul(stats[0], scale).neg_()
        offset = offset if bias is None else offset.add_(bias)
        # Not on x itself: with four dimensions the broadcast is slow in this layout.
        torch.addcmul(offset.unsqueeze(1), _images(x), scale.unsqueeze(1), out=_images(y))
        return y
    unused = ones(0, stats.dtype)
    torch.native_batch_norm(
        x, weight, bias, stats[0], var, False, 0.0, eps, out=(y, unused, unused)
    )
    return y


def normalize_backward_reduce(grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    """See :func:`bnrewrite.reference.normalize_backward_reduce`."""
    if x.numel() == 0:
        return torch.zeros(2 * x.size(1), dtype=torch.float64)
    mean, rstd = stats.unbind()
    batch, values = x.size(0), x.numel()
    if values <= _REDUCE_PIECE or not x.is_contiguous() or values < 256 * batch * x.size(1):
        return _reduce(grad, x, mean, rstd).double()
    step = max(1, _REDUCE_PIECE * batch // values)
    parts = [
        _reduce(grad[start : start + step], x[start : start + step], mean, rstd)
        for start in range(0, batch, step)
    ]
    return torch.stack(parts).sum(0, dtype=torch.float64)


activation_backward_reduce = activation_backward_reduce_with(normalize_backward_reduce)


def _reduce(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Sums (2C,) of g and of g * xhat in the dtype of the statistics."""
    # The weight argument matters to the input gradient only, which is not asked for.
    _, sum_grad_xhat, sum_grad = _aten.native_batch_norm_backward(
        grad, x, rstd, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return torch.cat((sum_grad, sum_grad_xhat))


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
    """See :func:`bnrewrite.reference.normalize_backward`.

    With ``scale = weight * rstd`` and ``slope = scale * rstd * mean_g_xhat`` the gradient is the
    difference of two affine maps, of g and of x, each of which is one call of ATen:

        dx = scale * (g - mean_g) - slope * (x - mean)

    In the dtype of the statistics the second one is a multiply-add on the result, once x is
    centered or its mean is folded into the first one's offset. bfloat16 and float16 round both maps
    and the difference, which costs at most 1.4 times ATen's error (measured on ResNet-50's shapes).
    """
    if x.numel() == 0:
        return torch.empty_like(x)
    grad = through_activation(grad, x, stats, weight, bias, kept, activation, slope)
    mean = stats[0]
    scale, mean_grad, slope_x = channels.backward_table(stats, totals, weight, sums).unbind()
    one, unused = ones(x.size(1), scale.dtype), ones(0, scale.dtype)
    if x.numel() <= _SMALL and x.dtype == stats.dtype:
        dx = torch.native_batch_norm(grad, scale, None, mean_grad, one, False, 0.0, 0.0)[0]
        centered = x - reference.per_channel(mean, x)
        return dx.addcmul_(centered, reference.per_channel(slope_x, x), value=-1)
    dx = torch.empty_like(x)
    if x.dtype == stats.dtype:
        _apply_wide(grad, x, dx, mean, scale, mean_grad, slope_x)
        return dx
    step = max(1, _PIECE * x.size(0) // x.numel())
    piece = torch.empty_like(x[:step])
    for start in range(0, x.size(0), step):
        rows = slice(start, start + step)
        out = dx[rows]
        other = piece[: out.size(0)]
        torch.native_batch_norm(
            grad[rows], scale, None, mean_grad, one, False, 0.0, 0.0, out=(out, unused, unused)
        )
        torch.native_batch_norm(
            x[rows], slope_x, None, mean, one, False, 0.0, 0.0, out=(other, unused, unused)
        )
        out.sub_(other)
    return dx


def _apply_wide(
    grad: Tensor,
    x: Tensor,
    dx: Tensor,
    mean: Tensor,
    scale: Tensor,
    mean_grad: Tensor,
    slope: Tensor,
) -> None:
    """:func:`normalize_backward` into ``dx`` where all have the dtype of the statistics."""
    zero, one, unused = (
        torch.zeros_like(scale),
        ones(scale.numel(), scale.dtype),
        ones(0, x.dtype),
    )
    offset = torch.mul(slope, mean).addcmul_(scale, mean_grad, value=-1)
    vectorize = _channels_vectorize(x)
    grad, x, dx = _images(grad), _images(x), _images(dx)
    slope_C1, scale_C1, offset_C1 = slope.unsqueeze(1), scale.unsqueeze(1), offset.unsqueeze(1)
    step = max(1, _PIECE * x.size(0) // x.numel())
    for start in range(0, x.size(0), step):
        rows = slice(start, start + step)
        out = dx[rows]
        if vectorize:
            torch.addcmul(offset_C1, grad[rows], scale_C1, out=out)
        else:
            torch.native_batch_norm(
                grad[rows], scale, offset, zero, one, False, 0.0, 0.0, out=(out, unused, unused)
            )
        out.addcmul_(x[rows], slope_C1, value=-1)


def _images(x: Tensor) -> Tensor:
    """``x``, dense and contiguous or channels-last, as a contiguous (N, C, S).

    Channels-last becomes one image of a single position for each of its positions.
    """
    if x.is_contiguous():
        return x.view(x.size(0), x.size(1), -1)
    return x.movedim(1, -1).reshape(-1, x.size(1), 1)


def _channels_vectorize(x: Tensor) -> bool:
    """Whether neighboring values belong to neighboring channels.

    Then ``addcmul`` with two per-channel operands is vectorized, and beats ATen's BatchNorm.
    """
    return x.stride(1) == 1 and x.size(1) > 1


@functools.lru_cache(maxsize=64)
def ones(size: int, dtype: torch.dtype) -> Tensor:
    """Constant ones; they are only read, or in place of results of no size."""
    # Those made in inference mode nobody may use outside of it.
    with torch.inference_mode(False):
        return torch.ones(size, dtype=dtype)


def has_long_rows(x: Tensor, least: int = 1 << 16) -> bool:
    """Whether sums along rows beat ATen's per-channel loops, which are scalar for this layout.

    The loops cost about four times as much for a value. A row costs what they take for fifteen
    values, and the calls for all rows what they take for ``least``.
    """
    return walks_rows(x) and x.numel() >= least + 20 * x.size(0) * x.size(1)


def walks_rows(x: Tensor) -> bool:
    """Whether ATen reduces ``x`` row by row, in scalar loops."""
    return x.dim() > 2 and x.is_contiguous() and x.dtype in (torch.float32, torch.float64)


def _moments_by_rows(x_NCS: Tensor) -> Tensor:
    """Packed sums, from centered rows whose means and norms are merged."""
    N, C, S = x_NCS.shape
    rows_3NC = x_NCS.new_empty(3, N, C)
    mean_NC, rest_NC, norm_NC = rows_3NC.unbind()
    step = max(1, min(N, _PIECE // (C * S)))
    piece = x_NCS.new_empty(step, C, S)
    for start in range(0, N, step):
        part = slice(start, start + step)
        rows = x_NCS[part]
        centered = piece[: rows.size(0)]
        torch.mean(rows, 2, out=mean_NC[part])
        torch.sub(rows, mean_NC[part].unsqueeze(2), out=centered)
        torch.sum(centered, 2, out=rest_NC[part])
        torch.linalg.vector_norm(centered, dim=2, out=norm_NC[part])
    return channels.pack_rows(rows_3NC, S)
