"""The op ``batch_norm``: one BatchNorm evaluation, distributed over a process group.

It is a composite: in eager mode and under a compiler alike it becomes the phases and collectives
that the package docstring lists, with the autograd of this file around them.
"""

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.collectives import NO_GROUP, all_reduce_sum
from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.ops.library import LIBRARY, below_autograd
from bnrewrite.ops.moments import MOMENTS
from bnrewrite.ops.normalize import NORMALIZE
from bnrewrite.ops.normalize_backward import NORMALIZE_BACKWARD
from bnrewrite.ops.normalize_backward_reduce import NORMALIZE_BACKWARD_REDUCE

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LIBRARY.define(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, "
    "bool track_running_stats, float? momentum, float eps, str group) -> Tensor"
)


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    track_running_stats: bool,
    momentum: float | None,
    eps: float,
    group: str,
) -> Tensor:
    """Batch normalization with the semantics of ``torch.nn.SyncBatchNorm``, on any device.

        y = (input - mean) / sqrt(var + eps) * weight + bias

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64, any strides. N may be zero, and
            may differ between ranks.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        running_mean: (C,), updated in place in training; None if statistics are not tracked.
        running_var: (C,), as ``running_mean``.
        num_batches_tracked: scalar, int64, incremented in training, or None.
        training: use the statistics of the batch, as also happens without running statistics.
        track_running_stats: whether training reads and updates the running statistics.
        momentum: weight of the batch in the running statistics; None for a cumulative average.
        eps: added to the variance.
        group: name of the process group over which statistics are shared, or "".

    Returns:
        (N, C, *), in the dtype and memory format of ``input``.

    Raises:
        UnsupportedBatchNorm: a size or dtype does not fit, or a channel has a single value.

    Reference: Ioffe and Szegedy 2015 (https://arxiv.org/abs/1502.03167).
    """
    tensors = (weight, bias, running_mean, running_var)
    if not training and running_mean is not None:
        _check(input, tensors)
        return torch.ops.aten.batch_norm.default(
            input, weight, bias, running_mean, running_var, False, 0.0, eps,
            torch.backends.cudnn.enabled,
        )  # fmt: skip
    check_statistics(input, tensors, group)
    if not (training and track_running_stats):
        running_mean = running_var = num_batches_tracked = None
    return _BatchNorm.apply(
        input.contiguous(memory_format=_memory_format(input)),
        weight,
        bias,
        eps,
        (running_mean, running_var, num_batches_tracked, momentum),
        group,
    )


LIBRARY.impl("batch_norm", _batch_norm, "CompositeImplicitAutograd")

BATCH_NORM = torch.ops.bnrewrite.batch_norm.default


class _BatchNorm(torch.autograd.Function):
    """Statistics, collective, normalisation; the gradient is that of the global batch."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, running, group):
        with below_autograd():
            totals = all_reduce_sum(MOMENTS(x), group)
            y, stats = NORMALIZE(x, totals, weight, bias, eps, *running)
        ctx.save_for_backward(x, weight, stats, totals)
        ctx.eps = eps
        ctx.group = group
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, stats, totals = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_memory_format(x))
        if torch.is_grad_enabled():
            # create_graph: the statistics depend on x too, and every phase is differentiable.
            totals = all_reduce_sum(MOMENTS(x), ctx.group)
            stats = reference.statistics(totals, ctx.eps, stats.dtype)
            return _backward(ctx, grad, x, weight, stats, totals)
        with below_autograd():
            return _backward(ctx, grad, x, weight, stats, totals)


def _backward(ctx, grad, x, weight, stats, totals):
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    sums = NORMALIZE_BACKWARD_REDUCE(grad, x, stats)
    # Gradients of weight and bias stay local: DistributedDataParallel averages them.
    grad_bias, grad_weight = sums.chunk(2)
    grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
    grad_bias = grad_bias.to(ctx.bias_dtype) if needs_bias else None
    grad_x = None
    if needs_x:
        sums = all_reduce_sum(sums, ctx.group)
        grad_x = NORMALIZE_BACKWARD(grad, x, stats, totals, weight, sums)
    return grad_x, grad_weight, grad_bias, None, None, None


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last if ``x`` is laid out so, else contiguous."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def check_statistics(input: Tensor, tensors: tuple[Tensor | None, ...], group: str) -> None:
    """Refuses an input of which no statistics can be taken.

    Args:
        input: what is to be normalised.
        tensors: weight, bias, running_mean, running_var.
        group: name of the process group, or "".

    Raises:
        UnsupportedBatchNorm: a size or dtype does not fit, or a channel has a single value.
    """
    _check(input, tensors)
    if group == NO_GROUP and input.numel() == input.size(1):
        raise UnsupportedBatchNorm(
            f"expected more than 1 value per channel when training, got input size "
            f"{tuple(input.shape)}. Use a larger batch, or .eval() on the layer.",
            tensors,
        )


def _check(input: Tensor, per_channel: tuple[Tensor | None, ...]) -> None:
    if input.dim() < 2:
        raise UnsupportedBatchNorm(
            f"expected an input of shape (N, C, *), got {input.dim()} dimension(s): "
            f"{tuple(input.shape)}. Add the missing dimension with unsqueeze().",
            per_channel,
        )
    if input.dtype not in _FLOATS:
        raise UnsupportedBatchNorm(
            f"expected a floating-point input, got {input.dtype}. Convert it with .float().",
            per_channel,
        )
    shape = input.shape[1:2]
    for index, tensor in enumerate(per_channel):
        if tensor is not None and tensor.shape != shape:
            name = ("weight", "bias", "running_mean", "running_var")[index]
            raise UnsupportedBatchNorm(
                f"{name} has shape {tuple(tensor.shape)} but the input has {shape[0]} "
                f"channels: {tuple(input.shape)}. Check the layer that feeds it.",
                per_channel,
            )
    if (per_channel[2] is None) != (per_channel[3] is None):
        raise UnsupportedBatchNorm(
            "running_mean and running_var must be given together, or neither of them.",
            per_channel,
        )
