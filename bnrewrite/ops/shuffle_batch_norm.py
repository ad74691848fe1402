"""The op ``shuffle_batch_norm``: one BatchNorm evaluation with the statistics of another rank.

It is a composite as ``batch_norm`` is, of these phases and collectives (random schedules and
running statistics of the group use an all-gather in place of the forward send, and random ones in
place of the backward send):

    forward    moments -> send to the borrower -> normalize
    backward   normalize_backward_reduce -> send to the lender -> shuffle_backward
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.traceback import get_current_meta
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachingTorchDispatchMode

from bnrewrite import reference
from bnrewrite.collectives import all_gather, receive_from, send_around
from bnrewrite.errors import BnRewriteError, UnsupportedBatchNorm
from bnrewrite.groups import NO_GROUP
from bnrewrite.guards import is_compiling, runs_in_python
from bnrewrite.kernels.statistics import recomputes
from bnrewrite.ops.batch_norm import BATCH_NORM, unknown_to_torch
from bnrewrite.ops.library import (
    LIBRARY,
    below_autograd,
    define_composite,
    knows_only_torch,
    run,
)
from bnrewrite.ops.moments import MOMENTS
from bnrewrite.ops.normalize import NORMALIZE
from bnrewrite.ops.normalize_backward_reduce import NORMALIZE_BACKWARD_REDUCE
from bnrewrite.ops.shuffle_backward import SHUFFLE_BACKWARD
from bnrewrite.ops.shuffle_peers import SHUFFLE_PEERS
from bnrewrite.ops.sites import check, dense, memory_format
from bnrewrite.ops.update_running import UPDATE_RUNNING

LIBRARY.define(
    "shuffle_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, "
    "bool track_running_stats, float? momentum, float eps, str group, int[] place, SymInt site, "
    "str schedule, str backward, str running, int seed) -> Tensor"
)


class _Plan(NamedTuple):
    """Who borrows from whom: the arguments of the op that say so, and the number of the site."""

    group: str
    rank: int
    world_size: int
    site: int
    is_random: bool
    detach: bool
    follow_group: bool
    seed: int
    # Only to name the site if a peer dies; a compiler has no use for it.
    tensors: tuple[Tensor | None, ...]

    @property
    def place(self) -> tuple[int, int]:
        return self.rank, self.world_size


def _shuffle_batch_norm(
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
    place: list[int],
    site: int,
    schedule: str,
    backward: str,
    running: str,
    seed: int,
) -> Tensor:
    """Batch normalization with the statistics of another rank, on any device.

        y = (input - mean_peer) / sqrt(var_peer + eps) * weight + bias

    Outside training and without a group this is ``batch_norm``. A rank whose peer holds an empty
    batch uses its own statistics.

    Args:
        input: (N, C, *), and what follows, as ``batch_norm`` takes them.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        running_mean: (C,), or None.
        running_var: (C,), or None.
        num_batches_tracked: scalar, int64, or None.
        training: use the statistics of a batch.
        track_running_stats: whether training reads and updates the running statistics.
        momentum: weight of the batch in the running statistics; None for a cumulative average.
        eps: added to the variance.
        group: name of the process group over which statistics are borrowed, or "".
        place: rank of this process in the group, and the number of its ranks.
        site: number of the site, which tells random schedules of different sites apart.
        schedule: "ring" or "random". The step of a random schedule is ``num_batches_tracked``;
            without it a digest of the statistics of all ranks, which is the same on all of them.
        backward: "exact", or "detach" for constant borrowed statistics.
        running: whose statistics the running ones follow, "peer" or "group".
        seed: of the random schedule.

    Returns:
        (N, C, *), in the dtype and memory format of ``input``.

    Raises:
        UnsupportedBatchNorm: a size or dtype does not fit, or a channel has a single value.
        BnRewriteError: activation checkpointing recomputes a random schedule.
    """
    if not training or group == NO_GROUP:
        return BATCH_NORM(
            input, weight, bias, running_mean, running_var, num_batches_tracked, training,
            track_running_stats, momentum, eps, NO_GROUP,
        )  # fmt: skip
    per_channel = (weight, bias, running_mean, running_var)
    if knows_only_torch():
        raise unknown_to_torch(per_channel)
    check(input, per_channel)
    if not track_running_stats:
        running_mean = running_var = num_batches_tracked = None
    if input.numel() == input.size(1):
        raise UnsupportedBatchNorm(
            f"expected more than 1 value per channel on every rank when shuffling statistics, got "
            f"input size {tuple(input.shape)}: a peer cannot use the variance of a single value. "
            "Use a larger batch or mode 'sync', or call .eval() on the layer.",
            per_channel,
        )
    is_random = schedule == "random"
    if is_random and num_batches_tracked is not None and _recomputes():
        raise BnRewriteError(
            "activation checkpointing recomputes a site of mode Shuffle(schedule='random') with "
            "the permutation of a later step, so the gradient would be wrong. Use "
            "schedule='ring', or keep BatchNorm out of the checkpointed part."
        )
    plan = _Plan(
        group=group,
        rank=place[0],
        world_size=place[1],
        site=site,
        is_random=is_random,
        detach=backward == "detach",
        follow_group=running == "group" and running_mean is not None,
        seed=seed,
        tensors=() if is_compiling() else per_channel,
    )
    return _ShuffleBatchNorm.apply(
        dense(input),
        weight,
        bias,
        eps,
        (running_mean, running_var, num_batches_tracked, momentum, False),
        plan,
    )


define_composite("shuffle_batch_norm", _shuffle_batch_norm)

SHUFFLE_BATCH_NORM = torch.ops.bnrewrite.shuffle_batch_norm.default


def _recomputes() -> bool:
    """Whether this forward is recomputed in backward, or traced to be."""
    return (
        recomputes()
        or "recompute" in get_current_meta()
        or any(
            isinstance(mode, _CachingTorchDispatchMode)
            for mode in _get_current_dispatch_mode_stack()
        )
    )


class _ShuffleBatchNorm(torch.autograd.Function):
    """Own statistics, exchange, normalization with the peer's; the gradient is the true one."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, running, plan):
        with below_autograd():
            own = run(MOMENTS, x)
            peer, peers, everyone = _borrow(own, running[2], plan)
            # Only the device knows whether the peer holds anything.
            alone = peer[:1] == 0
            used = torch.where(alone, _substitute(own, x, everyone, plan), peer)
            if plan.follow_group:
                y, stats = run(NORMALIZE, x, used, weight, bias, eps, None, None, None, None, False)
                UPDATE_RUNNING(everyone, *running)
            else:
                y, stats = run(NORMALIZE, x, used, weight, bias, eps, *running)
        if plan.detach:
            alone = peers = None
        ctx.save_for_backward(x, weight, stats, own, alone, peers)
        ctx.eps = eps
        ctx.plan = plan
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @runs_in_python
    def backward(ctx, grad):
        x, weight, stats, own, alone, peers = ctx.saved_tensors
        grad = grad.contiguous(memory_format=memory_format(x))
        if not torch.is_grad_enabled():
            with below_autograd():
                return _backward(ctx, grad, x, weight, stats, own, alone, peers)
        if not ctx.plan.detach:
            # create_graph: the statistics depend on the ranks' x, and all phases and collectives
            # are differentiable.
            own = MOMENTS(x)
            peer = _receive(own, peers, ctx.plan, 1)
            stats = reference.statistics(torch.where(alone, own, peer), ctx.eps, stats.dtype)
        return _backward(ctx, grad, x, weight, stats, own, alone, peers)


def _borrow(
    own: Tensor, num_batches_tracked: Tensor | None, plan: _Plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Packed sums of the peer; in a random schedule peer and borrower; if known, all ranks' sum."""
    if not plan.is_random and not plan.follow_group:
        return send_around(own, plan.group, plan.place, 1, plan.tensors), None, None
    table = all_gather(own, plan.group, plan.world_size, plan.tensors)
    everyone = table.sum(0)
    if not plan.is_random:
        return table[(plan.rank + 1) % plan.world_size], None, everyone
    step = table.view(torch.int64).sum() if num_batches_tracked is None else num_batches_tracked
    peers = SHUFFLE_PEERS(step, plan.site, plan.seed, *plan.place)
    return table.index_select(0, peers[:1])[0], peers, everyone


def _substitute(own: Tensor, x: Tensor, everyone: Tensor | None, plan: _Plan) -> Tensor:
    """Packed sums in place of those of an empty peer: the rank's own.

    With two empty ranks in a row of a random schedule, those of the group: the counter of steps
    must advance on all ranks or on none.
    """
    return everyone if everyone is not None and plan.is_random and x.numel() == 0 else own


def _receive(values: Tensor, peers: Tensor | None, plan: _Plan, shift: int) -> Tensor:
    """What the peer (shift 1) or the borrower (shift -1) holds, differentiably."""
    if peers is None:
        return send_around(values, plan.group, plan.place, shift, plan.tensors)
    peers = peers if shift == 1 else peers.flip(0)
    return receive_from(values, plan.group, plan.world_size, peers, plan.tensors)


def _backward(ctx, grad, x, weight, stats, own, alone, peers):
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    sums = run(NORMALIZE_BACKWARD_REDUCE, grad, x, stats)
    num_channels = sums.numel() // 2
    # Gradients of weight and bias stay local: DistributedDataParallel averages them.
    grad_weight = sums[num_channels:].to(weight.dtype) if needs_weight else None
    grad_bias = sums[:num_channels].to(ctx.bias_dtype) if needs_bias else None
    grad_x = None
    if needs_x:
        lent = None
        if not ctx.plan.detach:
            lent = _receive(sums, peers, ctx.plan, -1)
            # A rank whose peer holds nothing has borrowed from itself, too.
            lent = torch.where(alone, lent + sums, lent)
        grad_x = run(SHUFFLE_BACKWARD, grad, x, stats, own, weight, lent, ctx.eps)
    return grad_x, grad_weight, grad_bias, None, None, None
