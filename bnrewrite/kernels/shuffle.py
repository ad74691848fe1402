"""Kernels of shuffled statistics: those of ``normalize_backward`` with other per-channel factors.

Bytes per element of x: shuffle_backward reads g and x and writes dx; without sums it reads g only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bnrewrite import reference

NormalizeBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]


def shuffle_backward_with(normalize_backward: NormalizeBackward) -> Callable[..., Tensor]:
    """The kernel of ``shuffle_backward`` on the device of ``normalize_backward``.

    With ``ratio = rstd_peer / rstd`` the gradient has the form of that kernel:

        dx = (weight * ratio) * rstd * (g - sum_g / ratio / n - xhat * sum_g_xhat / ratio / n)
    """

    def shuffle_backward(
        grad: Tensor,
        x: Tensor,
        stats: Tensor,
        own: Tensor,
        weight: Tensor | None,
        sums: Tensor | None,
        eps: float,
    ) -> Tensor:
        """See :func:`bnrewrite.reference.shuffle_backward`."""
        if x.numel() == 0:
            return torch.empty_like(x)
        if sums is None:
            return _scaled(grad, stats[1] if weight is None else stats[1] * weight)
        own_stats = reference.statistics(own, eps, stats.dtype)
        ratio = stats[1] / own_stats[1]
        sums = sums.view(2, -1).div(ratio).view(-1)
        weight = ratio if weight is None else ratio * weight
        return normalize_backward(grad, x, own_stats, own, weight, sums)

    return shuffle_backward


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """``grad * scale`` per channel, in one pass, in the dtype of ``grad``."""
    mean, var = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(grad, scale, None, mean, var, False, 0.0, 0.0)[0]
