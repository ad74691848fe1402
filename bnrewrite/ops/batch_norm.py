"""The op ``batch_norm``: one BatchNorm evaluation, distributed over a process group.

It is a composite: in eager mode and under a compiler alike it becomes the phases and collectives
that the package docstring lists, with the autograd of this file around them.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bnrewrite.collectives import all_reduce_sum
from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.groups import NO_GROUP
from bnrewrite.ops.batch_norm_local import apply_batch_norm_local
from bnrewrite.ops.checkpointing import communicate_once
from bnrewrite.ops.library import LIBRARY, define_composite, knows_only_torch, run
from bnrewrite.ops.moments import MOMENTS
from bnrewrite.ops.normalize_sites import normalize_sites
from bnrewrite.ops.sites import Site, dense, memory_format

LIBRARY.define(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, "
    "bool track_running_stats, float? momentum, float eps, str group, bool skip_nonfinite=False) "
    "-> Tensor"
)


def batch_norm(
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
    skip_nonfinite: bool = False,
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
        skip_nonfinite: a batch whose statistics are not finite leaves the running ones alone.

    Returns:
        (N, C, *), in the dtype and memory format of ``input``.

    Raises:
        UnsupportedBatchNorm: a size or dtype does not fit, or a channel has a single value.

    Reference: Ioffe and Szegedy 2015 (https://arxiv.org/abs/1502.03167).
    """
    site = Site(
        input, weight, bias, running_mean, running_var, num_batches_tracked,
        training, track_running_stats, momentum, eps, skip_nonfinite,
    )  # fmt: skip
    if not training and running_mean is not None:
        site.check()
        y = torch.ops.aten.batch_norm.default(
            input, weight, bias, running_mean, running_var, False, 0.0, eps,
            torch.backends.cudnn.enabled,
        )  # fmt: skip
        return _lay_out_gradient(y, input)
    if knows_only_torch():
        return _by_torch(site, group)
    if group == NO_GROUP and input.is_cpu:
        _check_statistics(site, group)
        layout = memory_format(input)
        x = input.contiguous(memory_format=layout)
        return apply_batch_norm_local(x, weight, bias, eps, site.running, layout)
    return evaluate_site(site, group)


def _lay_out_gradient(y: Tensor, input: Tensor) -> Tensor:
    """``y``, whose gradient will arrive in the memory format of ``input``.

    The strides of dimensions of size one may be anything, and torch's CPU backward then takes
    tensors whose values lie in another order for contiguous ones.
    """
    if input.dim() < 4 or not (y.requires_grad and input.is_cpu):
        return y
    # The size of a channel does not matter; a size that is not known yet may be one.
    if any(not isinstance(n, int) or n == 1 for n in (input.size(0), *input.shape[2:])):
        layout = memory_format(input)
        y.register_hook(lambda grad: grad.contiguous(memory_format=layout))
    return y


def evaluate_site(site: Site, group: str) -> Tensor:
    """Evaluates one site with batch statistics by the phases, with what follows it.

    Not under a transform for which :func:`knows_only_torch`.

    Raises:
        UnsupportedBatchNorm: a size or dtype does not fit, or a channel has a single value.
    """
    _check_statistics(site, group)
    x = dense(site.input)
    totals = communicate_once(
        (x,),
        (site.running_mean,),
        group,
        lambda: all_reduce_sum(run(MOMENTS, x), group, site.per_channel, is_last_use=True),
    )
    return normalize_sites([site], [x], totals, group)[0]


def _by_torch(site: Site, group: str) -> Tensor:
    """A site that shares with nobody as torch has it."""
    mean, var, num_batches_tracked, momentum, skip_nonfinite = site.running
    if group != NO_GROUP or skip_nonfinite:
        raise unknown_to_torch(site.per_channel)
    _check_statistics(site, group)
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1 / (float(num_batches_tracked) + 1)
    y = torch.ops.aten.batch_norm.default(
        site.input, site.weight, site.bias, mean, var, True, momentum, site.eps,
        torch.backends.cudnn.enabled,
    )  # fmt: skip
    # What torch refuses has changed nothing.
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return y


def unknown_to_torch(per_channel: tuple[Tensor | None, ...]) -> UnsupportedBatchNorm:
    """What to raise where :func:`knows_only_torch` and torch has no such BatchNorm."""
    return UnsupportedBatchNorm(
        "torch.func transforms do not support BatchNorm that communicates or skips batches that "
        "are not finite. Differentiate with torch.autograd, call .eval() on the layer, or convert "
        "with mode='local'.",
        per_channel,
    )


def _check_statistics(site: Site, group: str) -> None:
    """Refuses a site of whose input no statistics can be taken."""
    site.check()
    # Whether a tensor is an instance of a subclass takes longer to find out.
    if type(site.input) is not Tensor and isinstance(site.input, DTensor):
        raise UnsupportedBatchNorm(
            "the input is a DTensor, whose statistics are not defined here: its shards lie on the "
            "ranks of its own mesh. Pass the local tensor, input.to_local(), and convert with that "
            "mesh as process_group.",
            site.per_channel,
        )
    if group == NO_GROUP and site.input.numel() == site.input.size(1):
        raise UnsupportedBatchNorm(
            f"expected more than 1 value per channel when training, got input size "
            f"{tuple(site.input.shape)}. Use a larger batch, or call .eval() on the layer.",
            site.per_channel,
        )


define_composite("batch_norm", batch_norm)

BATCH_NORM = torch.ops.bnrewrite.batch_norm.default
