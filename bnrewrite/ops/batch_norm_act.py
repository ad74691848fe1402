"""The op ``batch_norm_act``: ``batch_norm``, then the sum with a residual, then an activation.

Where it saves memory traffic all of it happens in the phases of the normalisation, and the
activation's derivative in those of its backward; elsewhere it is what its parts are.
"""

import torch
from torch import Tensor

from bnrewrite import activations, reference
from bnrewrite.collectives import all_reduce_sum
from bnrewrite.groups import NO_GROUP
from bnrewrite.ops.activation_backward_reduce import ACTIVATION_BACKWARD_REDUCE
from bnrewrite.ops.batch_norm import _batch_norm, check_statistics
from bnrewrite.ops.checkpointing import communicate_once
from bnrewrite.ops.library import LIBRARY, below_autograd
from bnrewrite.ops.moments import MOMENTS
from bnrewrite.ops.normalize import NORMALIZE
from bnrewrite.ops.normalize_backward import NORMALIZE_BACKWARD
from bnrewrite.ops.normalize_backward_reduce import NORMALIZE_BACKWARD_REDUCE
from bnrewrite.ops.sites import Site, dense, memory_format

LIBRARY.define(
    "batch_norm_act(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, "
    "bool track_running_stats, float? momentum, float eps, str group, Tensor? residual, "
    "str activation, float slope, bool skip_nonfinite=False) -> Tensor"
)


def _batch_norm_act(
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
    residual: Tensor | None,
    activation: str,
    slope: float,
    skip_nonfinite: bool = False,
) -> Tensor:
    """``act(batch_norm(input, ...) + residual)``.

    The first arguments and what is refused are those of ``batch_norm``. ``residual`` is broadcast
    and promoted as by torch's ``+``, or None; ``activation`` is one of
    :data:`bnrewrite.activations.ACTIVATIONS`; ``slope`` is that of ``leaky_relu``.
    """
    if activation != "relu":
        activations.check_activation(activation, slope)
    uses_batch = training or running_mean is None
    if not (uses_batch and _profits(input, residual, activation, group)):
        # Both are composites, so the function is the op, without a dispatch of its own.
        y = _batch_norm(
            input, weight, bias, running_mean, running_var, num_batches_tracked, training,
            track_running_stats, momentum, eps, group, skip_nonfinite,
        )  # fmt: skip
        return _compose(y, residual, activation, slope)
    site = Site(
        input, weight, bias, running_mean, running_var, num_batches_tracked,
        training, track_running_stats, momentum, eps, skip_nonfinite,
    )  # fmt: skip
    check_statistics(site, group)
    x = dense(input)
    totals = communicate_once(
        (x,), (running_mean,), group, lambda: all_reduce_sum(MOMENTS(x), group, site.per_channel)
    )
    return _BatchNormAct.apply(x, weight, bias, residual, totals, site, group, (activation, slope))


LIBRARY.impl("batch_norm_act", _batch_norm_act, "CompositeImplicitAutograd")

BATCH_NORM_ACT = torch.ops.bnrewrite.batch_norm_act.default


def _compose(y: Tensor, residual: Tensor | None, activation: str, slope: float) -> Tensor:
    """``act(y + residual)`` by torch's own ops, into the fresh ``y`` where that changes nothing."""
    if residual is not None:
        fits = residual.shape == y.shape and residual.dtype == y.dtype
        in_place = fits and residual.stride() == y.stride()
        y = y.add_(residual) if in_place else y + residual
    if not activations.torch_keeps_result(activation):
        return activations.activate(y, activation, slope)
    activations.activate_(y, activation, slope)
    return y


def prefers_recomputing(x: Tensor) -> bool:
    """Whether arithmetic is free where ``x`` is, so that a backward better computes than reads."""
    return x.is_cuda


def _profits(input: Tensor, residual: Tensor | None, activation: str, group: str) -> bool:
    """Whether the phases can do all of it, without a copy, and faster than separate ops."""
    if group == NO_GROUP and not prefers_recomputing(input):
        # There one op does without phases what ``batch_norm`` has to do.
        return False
    if residual is not None:
        layout = memory_format(input)
        same = residual.shape == input.shape and residual.dtype == input.dtype
        if not (same and residual.device == input.device and input.dim() >= 2):
            return False
        # The strides of a sum are those of its first operand where the two differ.
        if not residual.is_contiguous(memory_format=layout):
            return False
    if activations.torch_keeps_result(activation):
        return True
    # Of other activations torch keeps the argument. Keeping the result would make an error of what
    # changes it in place afterwards, and computing the argument again needs no residual.
    return prefers_recomputing(input) and residual is None


class _BatchNormAct(torch.autograd.Function):
    """As ``batch_norm``'s, with the residual and the activation in the phases."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, totals, site, group, act):
        activation, _ = act
        with below_autograd():
            y, stats = NORMALIZE(x, totals, weight, bias, site.eps, *site.running, residual, *act)
        kept = residual
        if activation == "identity":
            kept = None
        elif activations.derivative_follows_from_result(activation) and (
            residual is not None or not prefers_recomputing(x)
        ):
            kept = y
        ctx.save_for_backward(x, weight, bias, stats, totals, kept)
        ctx.eps = site.eps
        # Only to name the site if a peer dies; a compiler has no use for it.
        ctx.site = () if torch.compiler.is_compiling() else site.per_channel
        ctx.group = group
        ctx.act = act
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, stats, totals, kept = ctx.saved_tensors
        grad = grad.contiguous(memory_format=memory_format(x))
        if torch.is_grad_enabled():
            # create_graph: the statistics depend on x too, and every phase is differentiable.
            totals = all_reduce_sum(MOMENTS(x), ctx.group, ctx.site)
            stats = reference.statistics(totals, ctx.eps, stats.dtype)
            return _backward(ctx, grad, x, weight, bias, stats, totals, kept)
        with below_autograd():
            return _backward(ctx, grad, x, weight, bias, stats, totals, kept)


def _backward(ctx, grad, x, weight, bias, stats, totals, kept):
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    act = ctx.act
    if act[0] == "identity":
        sums = NORMALIZE_BACKWARD_REDUCE(grad, x, stats)
    else:
        write = needs_residual or not prefers_recomputing(x)
        sums, inner = ACTIVATION_BACKWARD_REDUCE(grad, x, stats, weight, bias, kept, *act, write)
        if write:
            grad, act = inner, ("identity", 0.0)
    # Gradients of weight and bias stay local: DistributedDataParallel averages them.
    grad_bias, grad_weight = sums.chunk(2)
    grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
    grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
    grad_x = None
    if needs_x:
        sums = all_reduce_sum(sums, ctx.group, ctx.site)
        if act[0] == "identity":
            grad_x = NORMALIZE_BACKWARD(grad, x, stats, totals, weight, sums)
        else:
            grad_x = NORMALIZE_BACKWARD(grad, x, stats, totals, weight, sums, bias, kept, *act)
    return grad_x, grad_weight, grad_bias, grad if needs_residual else None, *[None] * 4
