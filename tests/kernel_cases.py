"""Arguments for kernels, and how close their results must be to float64."""

import numpy as np
import torch
from torch import Tensor

from bnrewrite import reference

EPS = 1e-3


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` (N, C, *) in another order in memory."""
    if layout == "contiguous":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def case(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    offset: float = 1.0,
) -> dict[str, Tensor]:
    """Consistent arguments of all kernels, statistics from the reference."""
    acc = reference.accumulate_dtype(dtype)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64).to(device)

    x, grad, residual = (
        laid_out(values.to(dtype), layout)
        for values in (draw(*shape) * 2 + offset, draw(*shape), draw(*shape))
    )
    totals = reference.moments(x)
    stats = reference.statistics(totals, EPS, acc)
    C = shape[1]
    return {
        "x": x,
        "grad": grad,
        "residual": residual,
        "totals": totals,
        "stats": stats,
        "weight": draw(C).to(acc),
        "bias": draw(C).to(acc),
        "sums": reference.normalize_backward_reduce(grad, x, stats),
    }


def check_close(result: Tensor, exact: Tensor, what: str, *, terms: float = 1.0) -> None:
    """``result`` is ``exact`` (float64) to its own rounding and that of accumulation.

    Each is allowed a few units in the last place of the largest value; ``terms`` is how many times
    larger the terms are than what they add up to.
    """
    acc = reference.accumulate_dtype(result.dtype)
    scale = max(exact.abs().max().item(), 1.0) if exact.numel() else 1.0
    unit = torch.finfo(result.dtype).eps if result.dtype.is_floating_point else 0.0
    allowed = scale * (unit + 16 * terms * torch.finfo(acc).eps)
    error = (result.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"
    assert result.shape == exact.shape, what


def check_moments(packed: Tensor, x: Tensor) -> None:
    """``packed`` has as many digits of the statistics of ``x`` as their precision has."""
    count, mean, var = (one.cpu() for one in reference.finalize(packed))
    # Wider than float64, in which the variance of many values is less exact than ours.
    values = x.double().cpu().movedim(1, 0).flatten(1).numpy().astype(np.longdouble)
    exact_mean, exact_var = (
        torch.from_numpy(one(values, axis=1).astype(np.float64)) for one in (np.mean, np.var)
    )
    assert packed.dtype == torch.float64
    assert count.item() == values.shape[1]
    unit = torch.finfo(reference.accumulate_dtype(x.dtype)).eps
    std = exact_var.sqrt().clamp_min(1e-3)
    # What packing costs in float64.
    packing = 4 * torch.finfo(torch.float64).eps * ((exact_mean / std) ** 2 + 1)
    assert ((mean - exact_mean).abs() <= std * (8 * unit + packing)).all()
    error = (var - exact_var).abs() / std**2
    assert (error <= 16 * unit + packing).all(), error.max()
