"""The autograd of sites with batch statistics: normalisation forward, one collective backward.

In eager mode the backward may be two nodes, so that other work runs while its collective does:

    _BatchNorm       sums of the gradients -> launch of the collective
    ...              whatever is ready, above all the slot (see :mod:`bnrewrite.ops.slot`)
    _EndCollective   end of the collective -> input gradients

For a compiler, which orders the graph by itself, where a graph of the backward is made, and where
that hides nothing (see :func:`bnrewrite.ops.slot.hides_collectives`), it is one node.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnrewrite import activations, reference
from bnrewrite.collectives import all_reduce_sum, end_all_reduce_sum, start_all_reduce_sum
from bnrewrite.groups import NO_GROUP
from bnrewrite.guards import is_compiling, is_ordered_by_compiler, runs_in_python
from bnrewrite.kernels.statistics import gradients_of
from bnrewrite.ops import sites as site_arguments
from bnrewrite.ops.hand_over import HandOver, runs
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
from bnrewrite.ops.sites import Site
from bnrewrite.ops.slot import hides_collectives, open_slot

_TENSORS = 4
"""Tensors that autograd is given for each site: x, weight, bias, residual."""

_NOBODY: set[int] = set()


def normalize_sites(
    sites: Sequence[Site], xs: Sequence[Tensor], totals: Tensor, group: str
) -> tuple[Tensor, ...]:
    """Normalises with totals that are there; the backward of all sites shares one collective.

    Args:
        sites: with batch statistics, of one process group; their running statistics move.
        xs: their inputs as :func:`bnrewrite.ops.sites.dense` makes them.
        totals: packed sums of all sites, one after the other, over all ranks.
        group: name of the process group that ``totals`` came from, or "".
    """
    # Only to name the sites if a peer dies; a compiler has no use for it.
    named: tuple[Tensor | None, ...] = ()
    if not is_compiling():
        named = tuple([one for site in sites for one in site.per_channel[:3]])
    scalars = [(site.eps, site.running, site.residual_site, site.act) for site in sites]
    tensors = [
        tensor
        for site, x in zip(sites, xs, strict=True)
        for tensor in (x, site.weight, site.bias, site.residual)
    ]
    inside = _inside_of_others(sites, xs) if len(sites) > 1 else _NOBODY
    has_backward = torch.is_grad_enabled()
    between = None
    if group != NO_GROUP and not is_compiling() and has_backward and hides_collectives(xs[0]):
        between = _put_behind_end_node(tensors, sites, inside)
    results: Any = _BatchNorm.apply(
        scalars, totals, group, has_backward, inside, between, named, *tensors
    )
    return results[: len(sites)]


def _put_behind_end_node(
    tensors: list[Any], sites: Sequence[Site], inside: set[int]
) -> HandOver | None:
    """Puts inputs behind the node that ends the collective of their backward, if they need one.

    That node reads parameters, too, and a hook on their gradients may run an optimizer: those are
    behind it as well, so that nobody has their gradients before.
    """
    wanted = [i for i in range(0, len(tensors), _TENSORS) if tensors[i].requires_grad]
    if not wanted:
        return None
    moved = wanted.copy()
    for i in wanted:
        weight, bias = tensors[i + 1], tensors[i + 2]
        if weight is not None and weight.requires_grad:
            moved.append(i + 1)
        # The common case, without a call.
        followed = inside or sites[i // _TENSORS].act[0] != "identity"
        if (
            followed
            and bias is not None
            and bias.requires_grad
            and _reads_bias(i // _TENSORS, sites, inside)
        ):
            moved.append(i + 2)
    between = HandOver([tensors[i].grad_fn for i in wanted])
    behind: Any = _EndCollective.apply(between, *[tensors[i] for i in moved])
    open_slot()
    for i, tensor in zip(moved, behind, strict=True):
        tensors[i] = tensor
    return between


def _reads_bias(index: int, sites: Sequence[Site], inside: set[int]) -> bool:
    """Whether the backward computes again what the site ``index`` activated, or a part of that."""
    site = sites[index]
    if site.act[0] == "identity" or not site_arguments.prefers_recomputing(site.input):
        return index in inside
    return site.residual is None and (site.residual_site is None or site.residual_site in inside)


class _EndCollective(torch.autograd.Function):
    """Inputs and parameters themselves; in backward, the end of the collective.

    It makes the gradients of the inputs, which come first, and hands on those of the parameters.
    """

    @staticmethod
    def forward(ctx, between: HandOver, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.between = between
        return tensors

    @staticmethod
    @runs_in_python
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        launched = None if is_ordered_by_compiler() else ctx.between.take()
        if launched is None:
            return None, *grads
        pending, sizes, gradients = launched
        with below_autograd():
            parts = split(end_all_reduce_sum(pending, sum(sizes)), sizes)
            found = input_gradients(gradients, parts)
        # Second derivatives come here by other ways than through the site, too.
        num = len(found)
        sums = (
            one if other is None else one + other
            for one, other in zip(found, grads[:num], strict=True)
        )
        return None, *sums, *grads[num:]


class _BatchNorm(torch.autograd.Function):
    """Normalisation of sites by the statistics of the global batch, and its gradient.

    The tensors are x, weight, bias and residual of each site in turn. A residual may also be the
    result of an earlier site, which is ``inside`` if it is normalised together with the later one.

    Results are y of each site, then what was activated, of the sites whose backward needs it: they
    are results so that derivatives of derivatives pass through them.
    """

    @staticmethod
    def forward(ctx, scalars, totals, group, has_backward, inside, between, named, *tensors):
        xs, weights = tensors[::_TENSORS], tensors[1::_TENSORS]
        biases, residuals = tensors[2::_TENSORS], tensors[3::_TENSORS]
        ys: list[Any] = []
        stats: list[Any] = []
        kept: list[Tensor | None] = []
        keepers: list[int] = []
        with below_autograd():
            parts = _totals_of(totals, xs)
            ones = [
                (x, total, weight, bias, eps, *running)
                for x, total, weight, bias, (eps, running, *_) in zip(
                    xs, parts, weights, biases, scalars, strict=True
                )
            ]
            for i, (one, residual, (_, _, from_site, act)) in enumerate(
                zip(ones, residuals, scalars, strict=True)
            ):
                other = residual if from_site is None else ys[from_site]
                total = None
                if i in inside:
                    # Nobody reads it, and it is normalised where its sum is.
                    y, stat = xs[i].new_empty(0), None
                elif from_site is not None and from_site in inside:
                    y, stat, stats[from_site] = run(NORMALIZE_TWO, *ones[from_site], *one, *act)
                elif other is None or activations.torch_keeps_result(act[0]) or not has_backward:
                    y, stat = run(NORMALIZE, *one, other, *act)
                    total = _kept(one[0], y, other, act[0])
                else:
                    y, stat, total = run(NORMALIZE_KEEP_SUM, *one, other, *act)
                    keepers.append(i)
                ys.append(y)
                stats.append(stat)
                kept.append(total)
        used = [
            bias if total is None and act[0] != "identity" else None
            for bias, total, (_, _, _, act) in zip(biases, kept, scalars, strict=True)
        ]
        for i in inside:
            used[i] = biases[i]
        ctx.save_for_backward(totals, *xs, *weights, *used, *stats, *kept)
        ctx.scalars = [(eps, from_site, act) for eps, _, from_site, act in scalars]
        ctx.inside = inside
        ctx.keepers = keepers
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.group = group
        ctx.between = between
        ctx.sites = named
        ctx.set_materialize_grads(False)
        return (*ys, *[kept[i] for i in keepers]) if keepers else tuple(ys)

    @staticmethod
    @runs_in_python
    def backward(ctx, *grads):
        num = len(ctx.scalars)
        totals, *saved = ctx.saved_tensors
        xs, weights, biases, stats, kept = (saved[i * num : (i + 1) * num] for i in range(5))
        if not torch.is_grad_enabled():
            with below_autograd():
                columns = (xs, stats, _totals_of(totals, xs), weights, biases, kept)
                return _backward(ctx, grads, columns, ctx.between)
        # create_graph: the statistics depend on x too, and every phase is differentiable.
        totals = all_reduce_sum(join([MOMENTS(x) for x in xs]), ctx.group, ctx.sites)
        parts = _totals_of(totals, xs)
        stats = [
            reference.statistics(total, eps, stat.dtype)
            for total, (eps, _, _), stat in zip(parts, ctx.scalars, stats, strict=True)
        ]
        return _backward(ctx, grads, (xs, stats, parts, weights, biases, kept), None)


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
    needs = ctx.needs_input_grad[-_TENSORS * num :]
    results: list[Tensor | None] = [None] * len(needs)
    ones: list[Any] = [None] * num
    sums: list[Any] = [None] * num
    wanted = [i for i in range(num) if needs[_TENSORS * i]]
    grads = list(grads[:num])
    others = list(zip(*columns, strict=True))
    for i in reversed(range(num)):
        _, from_site, act = ctx.scalars[i]
        first = _TENSORS * i
        # Of what nobody reads, the parameters get no gradient, as if the site were alone.
        is_read = grads[i] is not None
        one: Any = gradient_of(grads[i], *others[i], act)
        if of_sums is not None and of_sums.get(i) is not None:
            # From derivatives of derivatives.
            one = behind_activation(one, of_sums[i])
            is_read = True
        if sums[i] is None:
            if from_site in ctx.inside:
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
            grad_bias, grad_weight = gradients_of(sums[i], one.stats.dtype).chunk(2)
            if needs[first + 1]:
                results[first + 1] = _as(one.weight.dtype, grad_weight)
            if needs[first + 2]:
                results[first + 2] = _as(ctx.bias_dtypes[i], grad_bias)
        if needs[first + 3] and is_read:
            results[first + 3] = one.grad
    if wanted:
        found = _communicate(ctx, [sums[i] for i in wanted], [ones[i] for i in wanted], between)
        for i, grad in zip(wanted, found, strict=True):
            results[_TENSORS * i] = grad
    return None, None, None, None, None, None, None, *results


def _as(dtype: torch.dtype, vector: Tensor) -> Tensor:
    """``vector`` in ``dtype``; a call that does nothing takes its time, too."""
    return vector if vector.dtype is dtype else vector.to(dtype)


def _is_awaited(ctx, between: HandOver) -> bool:
    """Whether the node that ends the collective runs, and for the sake of an input."""
    if None not in between.nodes:
        return any(map(runs, between.nodes))
    # Whether the gradient of a leaf was asked for, torch does not say.
    end = _EndCollective._backward_cls
    return any(runs(node) for node, _ in ctx.next_functions if isinstance(node, end))


def _communicate(ctx, sums, ones, between):
    """The input gradients; None for each if another node makes them when the collective ends."""
    sizes = [one.numel() for one in sums]
    if between is not None and not is_ordered_by_compiler():
        if _is_awaited(ctx, between):
            pending = start_all_reduce_sum(join(sums), ctx.group, ctx.sites, is_last_use=True)
            saved = [tensor for one in ones if one is not None for tensor in one.saved]
            between.leave((pending, sizes, ones), saved)
        return [None] * len(ones)
    total = all_reduce_sum(join(sums), ctx.group, ctx.sites, is_last_use=True)
    return input_gradients(ones, split(total, sizes))


def join(vectors: list[Tensor]) -> Tensor:
    """One vector of all; a lone one itself."""
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def split(vector: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Inverse of :func:`join`."""
    return (vector,) if len(sizes) == 1 else vector.split(sizes)
