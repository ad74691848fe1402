"""Per-channel arithmetic of the CPU kernels, in NumPy on the memory of the tensors.

These steps work on C values, so their cost is the number of calls, and a call of NumPy costs a
third of one of torch: all of :func:`statistics_table` takes 7 us, in torch 22 us.
"""

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def pack(mean: Tensor, var: Tensor, count: int) -> Tensor:
    """Packed sums, (2C + 1,) float64, of mean and biased variance (C,) of ``count`` values."""
    C = mean.numel()
    packed = np.empty(2 * C + 1)
    with np.errstate(all="ignore"):
        packed[0] = 1
        packed[1 : C + 1] = mean.numpy()
        np.square(packed[1 : C + 1], out=packed[C + 1 :])
        packed[C + 1 :] += var.numpy()
        packed *= count
    return torch.from_numpy(packed)


def statistics_table(totals: Tensor, eps: float, acc: torch.dtype) -> Tensor:
    """Mean, rstd, biased and unbiased variance, (4, C) in ``acc``, of packed sums.

    The count must not be zero. See :func:`bnrewrite.kernels.statistics.statistics_table`.
    """
    packed = totals.numpy()
    C = (packed.size - 1) // 2
    table = np.empty((4, C), _NUMPY[acc])
    with np.errstate(all="ignore"):
        count = packed[0]
        mean = packed[1 : C + 1] / count
        var = packed[C + 1 :] / count
        var -= mean * mean
        np.maximum(var, 0, out=var)
        table[0] = mean
        table[2] = var
        table[3] = var * (count / max(count - 1, 1))
        var += eps
        table[1] = 1 / np.sqrt(var, out=var)
    return torch.from_numpy(table)


def backward_table(stats: Tensor, totals: Tensor, weight: Tensor | None, sums: Tensor) -> Tensor:
    """Coefficients of the input gradient, (3, C) in the dtype of ``stats``.

    scale = weight * rstd      mean_g = sum_g / n      slope = scale * rstd * sum_g_xhat / n
    """
    rstd = stats.numpy()[1]
    C = rstd.size
    table = np.empty((3, C), rstd.dtype)
    with np.errstate(all="ignore"):
        means = sums.numpy() / totals.numpy()[0]
        scale = table[0]
        scale[:] = rstd if weight is None else rstd * weight.detach().to(stats.dtype).numpy()
        table[1] = means[:C]
        table[2] = means[C:]
        table[2] *= rstd
        table[2] *= scale
    return torch.from_numpy(table)
