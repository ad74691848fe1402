"""The mathematics of distributed BatchNorm in plain, differentiable torch.

Every op, kernel, test and page of documentation answers to these functions. They are written to be
read; none of them is fast. Letters: N batch, C channels, S positions (all spatial dimensions),
``acc`` the accumulation dtype, float64 for float64 input and float32 otherwise.

Sources: S. Ioffe and C. Szegedy, "Batch Normalization", 2015, algorithm 1 and section 3
(https://arxiv.org/abs/1502.03167); T. Chan, G. Golub and R. LeVeque, "Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", 1979, for the sums over parts.
"""

import torch
from torch import Tensor

from bnrewrite import activations


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of ``dtype`` values are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (C,) viewed so that it broadcasts over dimension 1 of ``like`` (N, C, *)."""
    return values.view([1, -1] + [1] * (like.dim() - 2))


def reduced_dims(x: Tensor) -> list[int]:
    """All dimensions of ``x`` (N, C, *) but the channels."""
    return [0, *range(2, x.dim())]


def moments(x: Tensor) -> Tensor:
    """Count, sum and sum of squares per channel, packed so that one all-reduce merges ranks.

        packed = [n, n * mean_0 ... n * mean_C-1, m2_0 + n * mean_0^2, ...]     n = N * S

    The sums are formed from centred statistics, so no digits are lost in float32; in float64 the
    cancellation of the packed form costs ``1e-16 * mean^2 / var``.

    Args:
        x: (N, C, *), floating point. Any memory format. N may be zero.

    Returns:
        (2C + 1,), float64, whatever the dtype and the size of ``x``: all ranks send the same bytes.
    """
    num_values = x.numel() // max(x.size(1), 1)
    x64 = x.double()
    total = x64.sum(reduced_dims(x))
    squares = (x64 * x64).sum(reduced_dims(x))
    count = total.new_full((1,), num_values)
    return torch.cat([count, total, squares])


def finalize(totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (1,), mean (C,) and biased variance (C,) of packed sums ``totals`` (2C + 1,), float64.

    If no rank holds a value the count is zero, and so are mean and variance.
    """
    num_channels = (totals.numel() - 1) // 2
    count = totals[:1]
    mean, square = (totals[1:] / count.clamp_min(1)).split(num_channels)
    return count, mean, (square - mean * mean).clamp_min(0)


def statistics(totals: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Mean and rstd, (2, C) in ``dtype``, of packed sums ``totals`` (2C + 1,), float64."""
    _, mean, var = finalize(totals)
    return torch.stack([mean, torch.rsqrt(var + eps)]).to(dtype)


def affine(x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(x - mean) * rstd * weight + bias``, as ``x`` (N, C, *), in ``acc``."""
    scale = stats[1] if weight is None else stats[1] * weight
    y = (x - per_channel(stats[0], x)) * per_channel(scale, x)
    return y if bias is None else y + per_channel(bias, x)


def normalize(
    x: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``y = act((x - mean) * rstd * weight + bias + residual)`` and the statistics it used.

    Args:
        x: (N, C, *), floating point.
        totals: (2C + 1,), float64, packed sums as :func:`moments` returns them, summed over ranks.
        weight: (C,) or None for ones.
        bias: (C,) or None for zeros.
        eps: added to the variance.
        residual: as ``x``, or None for zeros.
        activation: one of :data:`bnrewrite.activations.ACTIVATIONS`.
        slope: of the activation, where it has one.

    Returns:
        y, as ``x`` in shape, dtype and memory format; stats (2, C), ``acc``: mean and rstd.
    """
    stats = statistics(totals, eps, accumulate_dtype(x.dtype))
    z = affine(x, stats, weight, bias)
    if residual is not None:
        z = z + residual
    return activations.activate(z, activation, slope).to(x.dtype), stats


def normalize_keep_sum(
    x: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`normalize`, and what was activated, as ``x``, for the backward."""
    total, stats = normalize(x, totals, weight, bias, eps, residual)
    y, _ = normalize(x, totals, weight, bias, eps, residual, activation, slope)
    return y, stats, total


def activation_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str,
    slope: float,
) -> Tensor:
    """Gradient of what was activated, ``grad * act'(z)``, which is the gradient of the residual.

    ``kept`` is what was activated, or the result of a ReLU, from which the derivative follows, too;
    None without a residual, where it is computed again. Returns ``acc``.
    """
    if activation == "identity":
        return grad
    z = affine(x, stats, weight, bias) if kept is None else kept
    acc = accumulate_dtype(x.dtype)
    return activations.activation_backward(grad.to(acc), z.to(acc), activation, slope)


def activation_backward_reduce(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str,
    slope: float,
    write: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of the gradient of what was activated, and that gradient, (0,) if it is not wanted."""
    inner = activation_backward(grad, x, stats, weight, bias, kept, activation, slope)
    sums = normalize_backward_reduce(inner, x, stats)
    return sums, inner.to(x.dtype) if write else x.new_empty(0)


def normalize_backward_reduce(grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    """Sums of the output gradient that the input gradient needs, packed for one all-reduce.

        sums = [sum g ..., sum g * xhat ...]     xhat = (x - mean) * rstd

    The local value of these sums is also the local gradient of bias and weight.

    Args:
        grad: (N, C, *), gradient of the output.
        x: (N, C, *), input of the forward pass.
        stats: (2, C), ``acc``, mean and rstd of the forward pass.

    Returns:
        (2C,), float64.
    """
    grad64 = grad.double()
    mean, rstd = stats.double().unbind()
    xhat = (x.double() - per_channel(mean, x)) * per_channel(rstd, x)
    dims = reduced_dims(x)
    return torch.cat([grad64.sum(dims), (grad64 * xhat).sum(dims)])


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
    """Gradient of the input, given the sums of all ranks.

        dx = weight * rstd * (g - sum_g / n - xhat * sum_g_xhat / n)

    With an activation, ``g`` is :func:`activation_backward` of ``grad``.

    Args:
        grad: (N, C, *), gradient of the output.
        x: (N, C, *), input of the forward pass.
        stats: (2, C), ``acc``, mean and rstd of the forward pass.
        totals: (2C + 1,), float64, packed sums of the forward pass; its first entry is n.
        weight: (C,) or None for ones.
        sums: (2C,), float64, of :func:`normalize_backward_reduce`, summed over ranks.
        bias: (C,) or None for zeros, as ``kept`` and the following for the activation only.
        kept: see :func:`activation_backward`.
        activation: one of :data:`bnrewrite.activations.ACTIVATIONS`.
        slope: of the activation, where it has one.

    Returns:
        (N, C, *), as ``x``.
    """
    acc = accumulate_dtype(x.dtype)
    mean, rstd = stats.unbind()
    grad = activation_backward(grad, x, stats, weight, bias, kept, activation, slope)
    mean_grad, mean_grad_xhat = (sums / totals[:1].clamp_min(1)).to(acc).chunk(2)
    scale = rstd if weight is None else rstd * weight
    xhat = (x - per_channel(mean, x)) * per_channel(rstd, x)
    centred = grad - per_channel(mean_grad, x) - xhat * per_channel(mean_grad_xhat, x)
    return (centred * per_channel(scale, x)).to(x.dtype)


def batch_norm_local(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A whole BatchNorm by the statistics of ``x`` alone: :func:`normalize` by :func:`moments`.

    Args:
        x: (N, C, *), floating point. N may be zero.
        weight: (C,) or None for ones.
        bias: (C,) or None for zeros.
        eps: added to the variance.

    Returns:
        y, as ``x`` in shape, dtype and memory format; mean and rstd, (C,), ``acc``.
    """
    y, stats = normalize(x, moments(x), weight, bias, eps)
    mean, rstd = stats.unbind()
    return y, mean, rstd


def batch_norm_local_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`batch_norm_local`.

    Args:
        grad: (N, C, *), gradient of the output.
        x: (N, C, *), input of the forward pass.
        mean: (C,), ``acc``, of the forward pass.
        rstd: (C,), ``acc``, of the forward pass.
        weight: (C,) or None for ones.

    Returns:
        Gradients of x, as ``x``, and of weight and bias, (C,), ``acc``.
    """
    stats = torch.stack([mean, rstd])
    sums = normalize_backward_reduce(grad, x, stats)
    count = sums.new_full((1,), x.numel() // max(x.size(1), 1))
    dx = normalize_backward(grad, x, stats, count, weight, sums)
    grad_bias, grad_weight = sums.to(stats.dtype).chunk(2)
    return dx, grad_weight, grad_bias


def shuffle_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    own: Tensor,
    weight: Tensor | None,
    sums: Tensor | None,
    eps: float,
) -> Tensor:
    """Gradient of the input of a rank that normalized with a peer's statistics and lent its own.

        dx = weight * rstd_peer * g - weight * rstd / n * (sum_g + xhat * sum_g_xhat)

    ``xhat = (x - mean) * rstd`` and ``n`` are the rank's own; the sums are those of the rank that
    borrowed them, over its batch. The first term is the rank's own loss, the second the borrower's.

    Args:
        grad: (N, C, *), gradient of the output.
        x: (N, C, *), input of the forward pass.
        stats: (2, C), ``acc``, mean and rstd that the rank normalized with.
        own: (2C + 1,), float64, packed sums of ``x``.
        weight: (C,) or None for ones.
        sums: (2C,), float64, of :func:`normalize_backward_reduce` on the borrower; None if borrowed
            statistics are constants, so that the second term vanishes.
        eps: added to the variance.

    Returns:
        (N, C, *), as ``x``.
    """
    acc = accumulate_dtype(x.dtype)
    scale = stats[1] if weight is None else stats[1] * weight
    dx = grad * per_channel(scale, x)
    if sums is not None:
        mean, rstd = statistics(own, eps, acc).unbind()
        mean_grad, mean_grad_xhat = (sums / own[:1].clamp_min(1)).to(acc).chunk(2)
        scale = rstd if weight is None else rstd * weight
        xhat = (x - per_channel(mean, x)) * per_channel(rstd, x)
        lent = per_channel(mean_grad, x) + xhat * per_channel(mean_grad_xhat, x)
        dx = dx - per_channel(scale, x) * lent
    return dx.to(x.dtype)
