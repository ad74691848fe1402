"""Per-channel arithmetic of the CPU kernels, in NumPy on the memory of the tensors.

These steps work on C values, so their cost is the number of calls, and a call of NumPy costs less
than one of torch.

Only tensors that the kernels made themselves are lent to NumPy: a storage that NumPy has seen can
not be resized any more, which sharded parameters must be.
"""

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def pack(mean: np.ndarray, var: np.ndarray, count: int) -> Tensor:
    """Packed sums, (2C + 1,) float64, of mean and biased variance (C,) of ``count`` values."""
    C = mean.size
    packed = np.empty(2 * C + 1)
    with np.errstate(all="ignore"):
        packed[0] = 1
        packed[1 : C + 1] = mean
        np.square(packed[1 : C + 1], out=packed[C + 1 :])
        packed[C + 1 :] += var
        packed *= count
    return torch.from_numpy(packed)


def pack_rows(rows: Tensor, size: int) -> Tensor:
    """Packed sums, (2C + 1,) float64, of N rows for each channel, merged by Chan's formula.

    The mean of a row is rounded; what the centered row still sums to makes up for that, in the mean
    and in the variance.

    Args:
        rows: (3, N, C): mean of each row, sum of the row less that mean, and norm of it.
        size: values of each row.

    Reference: Chan, Golub and LeVeque 1979, Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances.
    """
    mean_NC, rest_NC, norm_NC = rows.numpy().astype(np.float64)
    num_rows = len(mean_NC)
    with np.errstate(all="ignore"):
        rest_NC /= size
        mean_NC += rest_NC
        mean = np.add.reduce(mean_NC) / num_rows
        mean_NC -= mean
        mean_NC *= mean_NC
        rest_NC *= rest_NC
        mean_NC -= rest_NC
        mean_NC *= size
        norm_NC *= norm_NC
        norm_NC += mean_NC
        var = np.add.reduce(norm_NC) / (num_rows * size)
    return pack(mean, var, num_rows * size)


def statistics_table(totals: Tensor, eps: float, acc: torch.dtype) -> Tensor:
    """Mean, rstd, biased and unbiased variance, (4, C) in ``acc``, of packed sums.

    See :func:`bnrewrite.kernels.statistics.statistics_table`.
    """
    packed = totals.numpy()
    C = (packed.size - 1) // 2
    table = np.empty((4, C), _NUMPY[acc])
    with np.errstate(all="ignore"):
        count = packed[0]
        divisor = max(count, 1)
        mean = packed[1 : C + 1] / divisor
        var = packed[C + 1 :] / divisor
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
    rstd = stats[1]
    scale = rstd if weight is None else rstd * weight
    table = np.empty((3, rstd.numel()), _NUMPY[stats.dtype])
    with np.errstate(all="ignore"):
        means = sums.numpy() / totals.numpy()[0]
        table[0] = scale.numpy()
        table[1:] = means.reshape(2, -1)
        table[2] *= rstd.numpy()
        table[2] *= table[0]
    return torch.from_numpy(table)
