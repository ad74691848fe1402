"""The autograd of sites with batch statistics: normalization forward, one collective backward.

In eager mode the backward may be two nodes, so that other work runs while its collective does: see
:mod:`bnrewrite.ops.end_collective`. For a compiler, which orders the graph by itself, where a graph
of the backward is made, and where that hides nothing, it is one node.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrewrite import activations, reference
from bnrewrite.collectives import all_reduce_sum, start_all_reduce_sum
from bnrewrite.errors import BackwardError
from bnrewrite.groups import NO_GROUP
from bnrewrite.guards import is_compiling, is_ordered_by_compiler, runs_in_python
from bnrewrite.kernels.statistics import gradients_of
from bnrewrite.naming import sites_of
from bnrewrite.ops import sites as site_arguments
from bnrewrite.ops.end_collective import is_awaited, put_behind_end_node
from bnrewrite.ops.hand_over import HandOver
from bnrewrite.ops.input_gradients import (
    IDENTITY,
    GradientOfTwo,
    behind_activation,
    gradient_of,
    input_gradients,
    reduce,
    reduce_two,
)
from bnrewrite.ops.library import below_autograd, run
from bnrewrite.ops.moments import MOMENTS
from bnrewrite.ops.normalize import NORMALIZE
from bnrewrite.ops.normalize_keep_sum import NORMALIZE_KEEP_SUM
from bnrewrite.ops.normalize_two import NORMALIZE_TWO
from bnrewrite.ops.sites import TENSORS, Site, join, split
from bnrewrite.ops.slot import hides_collectives

_NOBODY: set[int] = set()


def normalize_sites(
    sites: Sequence[Site], xs: Sequence[Tensor], totals: Tensor, group: str
) -> tuple[Tensor, ...]:
    """Normalizes with totals that are there; the backward of all sites shares one collective.

    Args:
        sites: with batch statistics, of one process group; their running statistics move.
        xs: their inputs as :func:`bnrewrite.ops.sites.dense` makes them.
        totals: packed sums of all sites, one after the other, over all ranks.
        group: name of the process group that ``totals`` came from, or "".
    """
    tensors = [
        tensor
        for site, x in zip(sites, xs, strict=True)
        for tensor in (x, site.weight, site.bias, site.residual)
    ]
    inside = _inside_of_others(sites, xs) if len(sites) > 1 else _NOBODY
    has_backward = torch.is_grad_enabled()
    named: tuple[Tensor | None, ...] = ()
    between = None
    if not is_compiling():
        # Only to name the sites if a peer dies; a compiler has no use for it.
        named = tuple([one for site in sites for one in site.per_channel[:3]])
        if group != NO_GROUP and has_backward and hides_collectives(xs[0]):
            between = put_behind_end_node(tensors, sites, inside)
    scalars = [(site.eps, site.running, site.residual_site, site.act) for site in sites]
    call = _Call(group, has_backward, inside, between, named)
    results: Any = _BatchNorm.apply(call, scalars, totals, *tensors)
    return results[: len(sites)]


class _Call(NamedTuple):
    """What the two halves of an evaluation know of it besides its sites.

    Attributes:
        group: name of the process group, or "".
        has_backward: whether gradients may be asked for.
        inside: sites that are normalized together with later ones.
        between: what the backward leaves for the node that ends its collective, if there is one.
        named: tensors by which an error finds the names of the sites.
    """

    group: str
    has_backward: bool
    inside: set[int]
    between: HandOver | None
    named: tuple[Tensor | None, ...]


class _BatchNorm(torch.autograd.Function):
    """Normalization of sites by the statistics of the global batch, and its gradient.

    The tensors are x, weight, bias and residual of each site in turn. A residual may also be the
    result of an earlier site, which is ``inside`` if it is normalized together with the later one.

    Results are y of each site, then what was activated, of the sites whose backward needs it: they
    are results so that derivatives of derivatives pass through them.
    """

    @staticmethod
    def forward(ctx, call: _Call, scalars, totals, *tensors):
        has_backward, inside = call.has_backward, call.inside
        xs, weights, biases = tensors[::TENSORS], tensors[1::TENSORS], tensors[2::TENSORS]
        ys: list[Any] = []
        stats: list[Any] = []
        kept: list[Tensor | None] = []
        used: list[Tensor | None] = []
        keepers: list[int] = []
        ones: list[Any] = []
        with below_autograd():
            parts = _totals_of(totals, xs)
            for i, (eps, running, from_site, act) in enumerate(scalars):
                x, weight, bias, residual = tensors[TENSORS * i : TENSORS * (i + 1)]
                one = (x, parts[i], weight, bias, eps, *running)
                other = residual if from_site is None else ys[from_site]
                total = None
                if i in inside:
                    # Nobody reads it, and it is normalized where its sum is.
                    y, stat = x.new_empty(0), None
                elif from_site is not None and from_site in inside:
                    y, stat, stats[from_site] = run(NORMALIZE_TWO, *ones[from_site], *one, *act)
                elif other is None or activations.torch_keeps_result(act[0]) or not has_backward:
                    y, stat = run(NORMALIZE, *one, other, *act)
                    total = _kept(x, y, other, act[0])
                else:
                    y, stat, total = run(NORMALIZE_KEEP_SUM, *one, other, *act)
                    keepers.append(i)
                ones.append(one)
                ys.append(y)
                stats.append(stat)
                kept.append(total)
                reads_bias = i in inside or (total is None and act[0] != "identity")
                used.append(bias if reads_bias else None)
        ctx.save_for_backward(totals, *xs, *weights, *used, *stats, *kept)
        ctx.call = call
        # What has moved may go.
        ctx.scalars = [(eps, from_site, act) for eps, _, from_site, act in scalars]
        ctx.keepers = keepers
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.set_materialize_grads(False)
        ctx.needed = _needed(ctx)
        if not all(ctx.needed):
            # Sites of a frozen branch: its results need no gradient because others share with it.
            ctx.mark_non_differentiable(
                *[y for y, needed in zip(ys, ctx.needed, strict=True) if not needed]
            )
        return (*ys, *[kept[i] for i in keepers]) if keepers else tuple(ys)

    @staticmethod
    @runs_in_python
    def backward(ctx, *grads):
        num = len(ctx.scalars)
        totals, *saved = _saved(ctx)
        xs, weights, biases, stats, kept = (saved[i * num : (i + 1) * num] for i in range(5))
        if not torch.is_grad_enabled():
            with below_autograd():
                columns = (xs, stats, _totals_of(totals, xs), weights, biases, kept)
                return _backward(ctx, grads, columns, ctx.call.between)
        # create_graph: the statistics depend on x too, and every phase is differentiable.
        totals = all_reduce_sum(join([MOMENTS(x) for x in xs]), ctx.call.group, ctx.call.named)
        parts = _totals_of(totals, xs)
        stats = [
            reference.statistics(total, eps, stat.dtype)
            for total, (eps, _, _), stat in zip(parts, ctx.scalars, stats, strict=True)
        ]
        return _backward(ctx, grads, (xs, stats, parts, weights, biases, kept), None)


def _needed(ctx) -> Sequence[bool]:
    """For each site whether a gradient goes through it; not so where nothing before it has one."""
    num = len(ctx.scalars)
    if num == 1:
        return (True,)
    needs = ctx.needs_input_grad[-TENSORS * num :]
    found: list[bool] = []
    for i, (_, from_site, _) in enumerate(ctx.scalars):
        own = any(needs[TENSORS * i : TENSORS * (i + 1)])
        found.append(own or (from_site is not None and found[from_site]))
    return found


def _saved(ctx) -> tuple[Tensor, ...]:
    """What the forward has saved for the backward.

    Raises:
        BackwardError: a backward from another of the sites has come here before, and freed it; or
            somebody has written to it.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        said = str(error)
        if "inplace" in said:
            raise BackwardError(
                f"{sites_of(ctx.call.named)}: the gradient needs the input and the parameters as "
                "the forward read them, but one of them has been modified by an inplace operation "
                f"since. Write y = y * 2 instead of y.mul_(2) after the layer. torch says: {said}"
            ) from error
        if len(ctx.scalars) == 1 or "a second time" not in said:
            raise
        raise BackwardError(
            f"{sites_of(ctx.call.named)}: these BatchNorm layers share a collective, so a backward "
            "pass from one of them goes through all of them, and an earlier backward pass has "
            "freed their saved tensors. Run backward on the sum of their losses, "
            "(a + b).backward(), or use backward(retain_graph=True) for all but the last. Without "
            f"the pass share_collectives, each layer has its own backward. torch says: {said}"
        ) from error


def _totals_of(totals: Tensor, xs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The packed sums of each site."""
    return (totals,) if len(xs) == 1 else totals.split([2 * x.size(1) + 1 for x in xs])


def _inside_of_others(sites: Sequence[Site], xs: Sequence[Tensor]) -> set[int]:
    """Sites whose results are only part of a later site's, and need no memory of their own."""
    return {
        other
        for x, site in zip(xs, sites, strict=True)
        if (other := site.residual_site) is not None
        and site_arguments.prefers_recomputing(x)
        # One kernel makes the gradients of both.
        and x.requires_grad == xs[other].requires_grad
        # One kernel moves the running statistics of both.
        and not any(
            mine is not None and mine is its
            for mine in site.running[:3]
            for its in sites[other].running[:3]
        )
    }


def _kept(x: Tensor, y: Tensor, residual: Tensor | None, activation: str) -> Tensor | None:
    """What tells the derivative of an activation; None if the arguments of the forward do."""
    if activation == "identity" or not activations.torch_keeps_result(activation):
        return None
    return y if residual is not None or not site_arguments.prefers_recomputing(x) else None


def _backward(ctx, grads, columns, between):
    num = len(ctx.scalars)
    of_sums = dict(zip(ctx.keepers, grads[num:], strict=True)) if ctx.keepers else None
    needs = ctx.needs_input_grad[-TENSORS * num :]
    results: list[Tensor | None] = [None] * len(needs)
    ones: list[Any] = [None] * num
    sums: list[Any] = [None] * num
    wanted = [i for i in range(num) if needs[TENSORS * i]]
    grads = list(grads[:num])
    others = list(zip(*columns, strict=True))
    for i in reversed(range(num)):
        if not ctx.needed[i]:
            continue
        _, from_site, act = ctx.scalars[i]
        first = TENSORS * i
        # Of what nobody reads, the parameters get no gradient, as if the site were alone.
        is_read = grads[i] is not None
        one: Any = gradient_of(grads[i], *others[i], act)
        if of_sums is not None and of_sums.get(i) is not None:
            # From derivatives of derivatives.
            one = behind_activation(one, of_sums[i])
            is_read = True
        if sums[i] is None:
            if from_site in ctx.call.inside:
                other = gradient_of(one.grad, *others[from_site], IDENTITY)
                sums[from_site], sums[i] = reduce_two(one, other)
                if i in wanted:
                    ones[i] = GradientOfTwo(one, other, wanted.index(from_site))
            else:
                needs_residual = needs[first + 3] or from_site is not None
                sums[i], one = reduce(one, write=needs_residual)
                ones[i] = one
            if from_site is not None:
                # Nobody else reads the result of that site, which comes before this one.
                grads[from_site] = one.grad if is_read else None
        # Gradients of weight and bias stay local: DistributedDataParallel averages them.
        if is_read and (needs[first + 1] or needs[first + 2]):
            grad_bias, grad_weight = gradients_of(sums[i], one.stats.dtype).view(2, -1).unbind()
            if needs[first + 1]:
                results[first + 1] = _as(one.weight.dtype, grad_weight)
            if needs[first + 2]:
                results[first + 2] = _as(ctx.bias_dtypes[i], grad_bias)
        if needs[first + 3] and is_read:
            results[first + 3] = one.grad
    if wanted:
        found = _communicate(ctx, [sums[i] for i in wanted], [ones[i] for i in wanted], between)
        for i, grad in zip(wanted, found, strict=True):
            results[TENSORS * i] = grad
    return None, None, None, *results


def _as(dtype: torch.dtype, vector: Tensor) -> Tensor:
    """``vector`` in ``dtype``; a call that does nothing takes its time, too."""
    return vector if vector.dtype is dtype else vector.to(dtype)


def _communicate(ctx, sums, ones, between):
    """The input gradients; None for each if another node makes them when the collective ends."""
    group, named = ctx.call.group, ctx.call.named
    sizes = [one.numel() for one in sums]
    if between is not None and not is_ordered_by_compiler():
        if is_awaited(ctx, between):
            pending = start_all_reduce_sum(join(sums), group, named, is_last_use=True)
            saved = [tensor for one in ones if one is not None for tensor in one.saved]
            between.leave((pending, sizes, ones), saved)
        return [None] * len(ones)
    total = all_reduce_sum(join(sums), group, named, is_last_use=True)
    return input_gradients(ones, split(total, sizes))
