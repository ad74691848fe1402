"""The ops ``batch_norm_local`` and its backward: BatchNorm by the statistics of one rank alone.

With no collective between them the phases of ``batch_norm`` join into one op each way. On the CPU,
where calls cost more than the arithmetic of small layers, it takes their place.
"""

from typing import Any

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.guards import runs_in_python
from bnrewrite.kernels import cpu_local
from bnrewrite.ops.library import below_autograd, define_phase, run
from bnrewrite.ops.moments import MOMENTS
from bnrewrite.ops.normalize import NORMALIZE
from bnrewrite.ops.normalize_backward import NORMALIZE_BACKWARD
from bnrewrite.ops.normalize_backward_reduce import NORMALIZE_BACKWARD_REDUCE


def _by_phases(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *running: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, stats = NORMALIZE(x, MOMENTS(x), weight, bias, eps, *running)
    # Results of an op share no memory.
    return y, stats[0].clone(), stats[1].clone()


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    acc = reference.accumulate_dtype(x.dtype)
    mean = x.new_empty(x.size(1), dtype=acc)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _definition(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.batch_norm_local(x, weight, bias, eps)


BATCH_NORM_LOCAL = define_phase(
    "batch_norm_local(Tensor x, Tensor? weight, Tensor? bias, float eps, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float? momentum, bool skip_nonfinite=False) -> (Tensor, Tensor, Tensor)",
    cpu=cpu_local.batch_norm_local,
    cuda=_by_phases,
    fake=_fake,
    definition=_definition,
    fallback=_by_phases,
)
"""See :func:`bnrewrite.reference.batch_norm_local`. It moves the running statistics, in place."""


def _backward_by_phases(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    stats = torch.stack([mean, rstd])
    sums = NORMALIZE_BACKWARD_REDUCE(grad, x, stats)
    count = sums.new_full((1,), x.numel() // max(x.size(1), 1))
    dx = NORMALIZE_BACKWARD(grad, x, stats, count, weight, sums)
    grad_bias, grad_weight = sums.to(mean.dtype).chunk(2)
    return dx, grad_weight.clone(), grad_bias.clone()


def _fake_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)


BATCH_NORM_LOCAL_BACKWARD = define_phase(
    "batch_norm_local_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=cpu_local.batch_norm_local_backward,
    cuda=_backward_by_phases,
    fake=_fake_backward,
    definition=reference.batch_norm_local_backward,
    fallback=_backward_by_phases,
)
"""See :func:`bnrewrite.reference.batch_norm_local_backward`."""


class _LocalBatchNorm(torch.autograd.Function):
    """``BATCH_NORM_LOCAL`` with its gradient, and with the gradient of that."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, running, memory_format):
        with below_autograd():
            y, mean, rstd = run(BATCH_NORM_LOCAL, x, weight, bias, eps, *running)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        ctx.memory_format = memory_format
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @runs_in_python
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=ctx.memory_format)
        if torch.is_grad_enabled():
            # create_graph: the statistics depend on x too, and every phase is differentiable.
            mean, rstd = reference.statistics(MOMENTS(x), ctx.eps, mean.dtype).unbind()
            return _gradients(ctx, grad, x, mean, rstd, weight)
        with below_autograd():
            return _gradients(ctx, grad, x, mean, rstd, weight)


def _gradients(ctx, grad, x, mean, rstd, weight):
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = None
    if needs_x:
        grad_x, grad_weight, grad_bias = run(BATCH_NORM_LOCAL_BACKWARD, grad, x, mean, rstd, weight)
    else:
        sums = NORMALIZE_BACKWARD_REDUCE(grad, x, torch.stack([mean, rstd]))
        grad_bias, grad_weight = sums.chunk(2)
    grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
    grad_bias = grad_bias.to(ctx.bias_dtype) if needs_bias else None
    return grad_x, grad_weight, grad_bias, None, None, None


apply_batch_norm_local = _LocalBatchNorm.apply
"""y from x, weight, bias, eps, (running_mean, running_var, num_batches_tracked, momentum) and the
memory format of x."""
