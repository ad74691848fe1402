"""The mathematics of distributed BatchNorm in plain, differentiable torch.

These functions are the definition that ops, kernels, tests and documentation must agree with. They
are written to be read, not to be fast. Letters: N batch, C channels, S positions (all spatial
dimensions), ``acc`` the accumulation dtype: float64 for float64 input and float32 otherwise.

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
    """``values`` (C,) reshaped so that it broadcasts along dimension 1 of ``like`` (N, C, *)."""
    return values.view([1, -1] + [1] * (like.dim() - 2))


def reduced_dims(x: Tensor) -> list[int]:
    """All dimensions of ``x`` (N, C, *) except the channels."""
    return [0, *range(2, x.dim())]


def moments(x: Tensor) -> Tensor:
    """Count, sum and sum of squares per channel, packed so that one all-reduce merges ranks.

        packed = [n, n * mean_0 ... n * mean_C-1, m2_0 + n * mean_0^2, ...]     n = N * S

    Kernels form the sums from centered statistics, so no digits are lost in float32. In float64,
    cancellation in the packed form costs ``1e-16 * mean^2 / var``.

    Args:
        x: (N, C, *), floating point. Any memory format. N may be zero.

    Returns:
        (2C + 1,), float64, for any dtype and size of ``x``, so all ranks send equally many bytes.
    """
    num_values = x.numel() // max(x.size(1), 1)
    x64 = x.double()
    total = x64.sum(reduced_dims(x))
    squares = (x64 * x64).sum(reduced_dims(x))
    count = total.new_full((1,), num_values)
    return torch.cat([count, total, squares])


def finalize(totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (1,), mean (C,), biased variance (C,) from packed sums ``totals`` (2C + 1,), float64.

    If no rank holds any values, count, mean and variance are zero.
    """
    num_channels = (totals.numel() - 1) // 2
    count = totals[:1]
    mean, square = (totals[1:] / count.clamp_min(1)).split(num_channels)
    return count, mean, (square - mean * mean).clamp_min(0)


def statistics(totals: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Mean and rstd, (2, C) in ``dtype``, from packed sums ``totals`` (2C + 1,), float64."""
    _, mean, var = finalize(totals)
    return torch.stack([mean, torch.rsqrt(var + eps)]).to(dtype)


def affine(x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(x - mean) * rstd * weight + bias``, with the shape of ``x`` (N, C, *), in ``acc``."""
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
        residual: like ``x``, or None for zeros.
        activation: one of :data:`bnrewrite.activations.ACTIVATIONS`.
        slope: slope of the activation, if it has one.

    Returns:
        y, with the shape, dtype and memory format of ``x``; stats (2, C), ``acc``: mean and rstd.
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
    """Like :func:`normalize`, and also returns the activation's input, like ``x``, for backward."""
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
    """Gradient of the activation's input, ``grad * act'(z)``, also the gradient of the residual.

    ``kept`` is the activation's input, or the output of a ReLU, which determines the derivative as
    well. Without a residual it is None, and the input is computed again. Returns ``acc``.
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
    """Sums of the gradient of the activation's input, and that gradient; (0,) unless ``write``."""
    inner = activation_backward(grad, x, stats, weight, bias, kept, activation, slope)
    sums = normalize_backward_reduce(inner, x, stats)
    return sums, inner.to(x.dtype) if write else x.new_empty(0)


def normalize_backward_reduce(grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    """Sums over the output gradient that the input gradient needs, packed for one all-reduce.

        sums = [sum g ..., sum g * xhat ...]     xhat = (x - mean) * rstd

    The local values of these sums are also the local gradients of bias and weight.

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
    """Gradient of the input, given the sums over all ranks.

        dx = weight * rstd * (g - sum_g / n - xhat * sum_g_xhat / n)

    With an activation, ``g`` is :func:`activation_backward` of ``grad``.

    Args:
        grad: (N, C, *), gradient of the output.
        x: (N, C, *), input of the forward pass.
        stats: (2, C), ``acc``, mean and rstd of the forward pass.
        totals: (2C + 1,), float64, packed sums of the forward pass; its first entry is n.
        weight: (C,) or None for ones.
        sums: (2C,), float64, from :func:`normalize_backward_reduce`, summed over ranks.
        bias: (C,) or None for zeros; this and the arguments below are only for the activation.
        kept: see :func:`activation_backward`.
        activation: one of :data:`bnrewrite.activations.ACTIVATIONS`.
        slope: slope of the activation, if it has one.

    Returns:
        (N, C, *), like ``x``.
    """
    acc = accumulate_dtype(x.dtype)
    mean, rstd = stats.unbind()
    grad = activation_backward(grad, x, stats, weight, bias, kept, activation, slope)
    mean_grad, mean_grad_xhat = (sums / totals[:1].clamp_min(1)).to(acc).chunk(2)
    scale = rstd if weight is None else rstd * weight
    xhat = (x - per_channel(mean, x)) * per_channel(rstd, x)
    centered = grad - per_channel(mean_grad, x) - xhat * per_channel(mean_grad_xhat, x)
    return (centered * per_channel(scale, x)).to(x.dtype)


def batch_norm_local(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A complete BatchNorm with the statistics of ``x``: :func:`moments`, then :func:`normalize`.

    Args:
        x: (N, C, *), floating point. N may be zero.
        weight: (C,) or None for ones.
        bias: (C,) or None for zeros.
        eps: added to the variance.

    Returns:
        y, with the shape, dtype and memory format of ``x``; mean and rstd, (C,), ``acc``.
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
        Gradients of x, like ``x``, and of weight and bias, (C,), ``acc``.
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
    """Gradient of the input on a rank that normalized with a peer's statistics and lent its own.

        dx = weight * rstd_peer * g - weight * rstd / n * (sum_g + xhat * sum_g_xhat)

    ``xhat = (x - mean) * rstd`` and ``n`` are the rank's own. The sums come from the rank that
    borrowed its statistics (the borrower), over that rank's batch. The first term comes from the
    rank's own loss, the second from the borrower's.

    Args:
        grad: (N, C, *), gradient of the output.
        x: (N, C, *), input of the forward pass.
        stats: (2, C), ``acc``, mean and rstd that the rank normalized with.
        own: (2C + 1,), float64, packed sums of ``x``.
        weight: (C,) or None for ones.
        sums: (2C,), float64, from :func:`normalize_backward_reduce` on the borrower; None if
            borrowed statistics are constants, so the second term vanishes.
        eps: added to the variance.

    Returns:
        (N, C, *), like ``x``.
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
