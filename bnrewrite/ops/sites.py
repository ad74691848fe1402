"""What the BatchNorm ops share: their arguments and checks, and the autograd around the phases."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.collectives import all_reduce_sum
from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.kernels.statistics import Running
from bnrewrite.ops.library import below_autograd
from bnrewrite.ops.moments import MOMENTS
from bnrewrite.ops.normalize import NORMALIZE
from bnrewrite.ops.normalize_backward import NORMALIZE_BACKWARD
from bnrewrite.ops.normalize_backward_reduce import NORMALIZE_BACKWARD_REDUCE

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Site(NamedTuple):
    """Arguments of one evaluation, as the op ``batch_norm`` takes them."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool
    track_running_stats: bool
    momentum: float | None
    eps: float
    skip_nonfinite: bool = False

    @property
    def per_channel(self) -> tuple[Tensor | None, ...]:
        """Tensors with one value per channel."""
        return (self.weight, self.bias, self.running_mean, self.running_var)

    @property
    def running(self) -> Running:
        """What this evaluation moves."""
        if not (self.training and self.track_running_stats):
            return (None, None, None, self.momentum, False)
        tensors = (self.running_mean, self.running_var, self.num_batches_tracked)
        return (*tensors, self.momentum, self.skip_nonfinite)

    def check(self) -> None:
        """Raises ``UnsupportedBatchNorm`` if a size or dtype does not fit."""
        check(self.input, self.per_channel)


def normalize_sites(
    sites: Sequence[Site], xs: Sequence[Tensor], totals: Tensor, group: str
) -> tuple[Tensor, ...]:
    """Normalises with totals that are there; the backward of all sites shares one collective.

    Args:
        sites: with batch statistics, of one process group; their running statistics move.
        xs: their inputs as :func:`dense` makes them.
        totals: packed sums of all sites, one after the other, over all ranks.
        group: name of the process group that ``totals`` came from, or "".
    """
    tensors = [t for site, x in zip(sites, xs, strict=True) for t in (x, site.weight, site.bias)]
    scalars = [(site.eps, site.running) for site in sites]
    return _BatchNorm.apply(scalars, totals, group, *tensors)  # pyright: ignore


class _BatchNorm(torch.autograd.Function):
    """Normalisation of sites by the statistics of the global batch, and its gradient.

    The tensors are x, weight and bias of each site in turn.
    """

    @staticmethod
    def forward(ctx, scalars, totals, group, *tensors):
        xs, weights, biases = tensors[::3], tensors[1::3], tensors[2::3]
        ys, stats = [], []
        with below_autograd():
            parts = split(totals, [2 * x.size(1) + 1 for x in xs])
            for x, weight, bias, total, (eps, running) in zip(
                xs, weights, biases, parts, scalars, strict=True
            ):
                y, stat = NORMALIZE(x, total, weight, bias, eps, *running)
                ys.append(y)
                stats.append(stat)
        ctx.save_for_backward(totals, *xs, *weights, *stats)
        ctx.eps = [eps for eps, _ in scalars]
        ctx.group = group
        # Only to name the sites if a peer dies; a compiler has no use for it.
        ctx.sites = () if torch.compiler.is_compiling() else named_by(tensors, scalars)
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grads):
        num = len(grads)
        totals, *saved = ctx.saved_tensors
        xs, weights, stats = saved[:num], saved[num : 2 * num], saved[2 * num :]
        grads = [
            grad.contiguous(memory_format=memory_format(x))
            for grad, x in zip(grads, xs, strict=True)
        ]
        sizes = [2 * x.size(1) + 1 for x in xs]
        if torch.is_grad_enabled():
            # create_graph: the statistics depend on x too, and every phase is differentiable.
            parts = split(
                all_reduce_sum(join([MOMENTS(x) for x in xs]), ctx.group, ctx.sites), sizes
            )
            stats = [
                reference.statistics(total, eps, stat.dtype)
                for total, eps, stat in zip(parts, ctx.eps, stats, strict=True)
            ]
            return _backward(ctx, grads, xs, weights, stats, parts)
        with below_autograd():
            return _backward(ctx, grads, xs, weights, stats, split(totals, sizes))


def _backward(ctx, grads, xs, weights, stats, parts):
    num = len(xs)
    needs = ctx.needs_input_grad[3:]
    results: list[Tensor | None] = [None] * len(needs)
    sums = [NORMALIZE_BACKWARD_REDUCE(*each) for each in zip(grads, xs, stats, strict=True)]
    # Gradients of weight and bias stay local: DistributedDataParallel averages them.
    for i in range(num):
        grad_bias, grad_weight = sums[i].chunk(2)
        if needs[3 * i + 1]:
            results[3 * i + 1] = grad_weight.to(weights[i].dtype)
        if needs[3 * i + 2]:
            results[3 * i + 2] = grad_bias.to(ctx.bias_dtypes[i])
    wanted = [i for i in range(num) if needs[3 * i]]
    if wanted:
        total_sums = all_reduce_sum(join([sums[i] for i in wanted]), ctx.group, ctx.sites)
        for i, total in zip(
            wanted, split(total_sums, [sums[i].numel() for i in wanted]), strict=True
        ):
            results[3 * i] = NORMALIZE_BACKWARD(
                grads[i], xs[i], stats[i], parts[i], weights[i], total
            )
    return None, None, None, *results


def named_by(tensors: Sequence[Tensor | None], scalars: Sequence[Any]) -> tuple[Any, ...]:
    """Tensors by which an error finds the names of the sites."""
    return (*tensors, *(tensor for _, running in scalars for tensor in running[:3]))


def join(vectors: list[Tensor]) -> Tensor:
    """One vector of all; a lone one itself."""
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def split(vector: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Inverse of :func:`join`."""
    return (vector,) if len(sizes) == 1 else vector.split(sizes)


def dense(input: Tensor) -> Tensor:
    """``input`` as the phases want it: contiguous or channels-last."""
    return input.contiguous(memory_format=memory_format(input))


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last if ``x`` is laid out so, else contiguous."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def check(input: Tensor, per_channel: tuple[Tensor | None, ...]) -> None:
    """Raises ``UnsupportedBatchNorm`` if a size or dtype does not fit.

    Args:
        input: must be (N, C, *) of a floating dtype.
        per_channel: weight, bias, running_mean and running_var: (C,) each, or None.
    """
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
