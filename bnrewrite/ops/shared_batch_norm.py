"""The ops ``start_batch_norm`` and ``finish_batch_norm``: sites that share their collectives.

Together they evaluate what ``batch_norm`` evaluates, for several sites that do not depend on each
other, with one collective forward and one backward. What runs between them runs while the
collective is under way.

    pending = start_batch_norm(inputs, ...)     moments of every site -> all-reduce
    ...
    ys = finish_batch_norm(pending, inputs, ...)      wait -> normalize for every site

What follows a site, a residual and an activation, is part of its normalization, as in
``batch_norm_act``; the residual may be the result of another site.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bnrewrite.collectives import end_all_reduce_sum, start_all_reduce_sum
from bnrewrite.groups import NO_GROUP
from bnrewrite.kernels.statistics import recomputes
from bnrewrite.ops.batch_norm import BATCH_NORM, unknown_to_torch
from bnrewrite.ops.checkpointing import communicate_once, hidden_from_policies
from bnrewrite.ops.epilogue import compose, joins_phases
from bnrewrite.ops.library import (
    LIBRARY,
    below_autograd,
    define_composite,
    knows_only_torch,
    run,
)
from bnrewrite.ops.moments import MOMENTS
from bnrewrite.ops.normalize_sites import normalize_sites
from bnrewrite.ops.sites import Site, check, dense, join

LIBRARY.define(
    "start_batch_norm(Tensor[] inputs, Tensor?[] weight, Tensor?[] bias, Tensor?[] running_mean, "
    "Tensor?[] running_var, str[] group) -> Tensor[]"
)
LIBRARY.define(
    "finish_batch_norm(Tensor[] pending, Tensor[] inputs, Tensor?[] weight, Tensor?[] bias, "
    "Tensor(a!)?[] running_mean, Tensor(b!)?[] running_var, Tensor(c!)?[] num_batches_tracked, "
    "bool[] training, bool[] track_running_stats, float?[] momentum, float[] eps, str[] group, "
    "bool[] skip_nonfinite, Tensor?[] residual, int[] residual_site, str[] activation, "
    "float[] slope, str[] into) -> Tensor[]"
)


def _start_batch_norm(
    inputs: list[Tensor],
    weight: list[Tensor | None],
    bias: list[Tensor | None],
    running_mean: list[Tensor | None],
    running_var: list[Tensor | None],
    group: list[str],
) -> list[Tensor]:
    """Launches the collective of several sites: the arguments of ``batch_norm`` as lists.

    Args:
        inputs: K tensors (N, C_k, *).
        weight: (C_k,) each, or None.
        bias: as ``weight``.
        running_mean: as ``weight``; they are only checked.
        running_var: as ``running_mean``.
        group: for each site the name of one and the same process group, or "" where a site does not
            communicate now: it takes no part.

    Returns:
        For :func:`finish_batch_norm` only: packed sums of the sites that take part; nothing of
        interest if none does.

    Raises:
        UnsupportedBatchNorm: a size or dtype does not fit.
    """
    for each in zip(inputs, weight, bias, running_mean, running_var, strict=True):
        check(each[0], each[1:])
    taking_part = [i for i, name in enumerate(group) if name != NO_GROUP]
    if not taking_part:
        # torch.export.load() reads no lists that are empty.
        return [inputs[0].new_empty(0)]
    if knows_only_torch():
        i = taking_part[0]
        raise unknown_to_torch((weight[i], bias[i], running_mean[i], running_var[i]))
    inputs = [inputs[i] for i in taking_part]
    name = group[taking_part[0]]

    def launch() -> list[Tensor]:
        packed = join([run(MOMENTS, dense(x)) for x in inputs])
        sites = (t for i in taking_part for t in (weight[i], bias[i], running_mean[i]))
        return start_all_reduce_sum(packed, name, tuple(sites), is_last_use=True)

    return communicate_once(inputs, [running_mean[i] for i in taking_part], name, launch)


def _finish_batch_norm(
    pending: list[Tensor],
    inputs: list[Tensor],
    weight: list[Tensor | None],
    bias: list[Tensor | None],
    running_mean: list[Tensor | None],
    running_var: list[Tensor | None],
    num_batches_tracked: list[Tensor | None],
    training: list[bool],
    track_running_stats: list[bool],
    momentum: list[float | None],
    eps: list[float],
    group: list[str],
    skip_nonfinite: list[bool],
    residual: list[Tensor | None],
    residual_site: list[int],
    activation: list[str],
    slope: list[float],
    into: list[str],
) -> list[Tensor]:
    """Normalizes the sites of a :func:`start_batch_norm`; running statistics move in list order.

    Args:
        pending: what ``start_batch_norm`` returned for the same inputs and groups.
        inputs: K tensors (N, C_k, *).
        weight: (C_k,) each, or None.
        bias: as ``weight``.
        running_mean: as ``weight``, updated in place.
        running_var: as ``running_mean``.
        num_batches_tracked: scalars, int64, incremented, or None.
        training: for each site as ``batch_norm`` takes it.
        track_running_stats: as ``training``.
        momentum: as ``training``.
        eps: as ``training``.
        group: the same as ``start_batch_norm`` was given.
        skip_nonfinite: as ``training``.
        residual: for each site what is added to it, or None.
        residual_site: for each site an earlier one whose result is added to it, or -1. That result
            may be anything then.
        activation: for each site the activation of the sum.
        slope: of the activations.
        into: for each site whether the sum is "new", or ``+=`` into its "own" result or into the
            "other" site's.

    Returns:
        K tensors (N, C_k, *), in the dtypes and memory formats of ``inputs``.

    Raises:
        UnsupportedBatchNorm: as ``batch_norm``.
    """
    sites = [
        Site(*each)
        for each in zip(
            inputs, weight, bias, running_mean, running_var, num_batches_tracked,
            training, track_running_stats, momentum, eps, skip_nonfinite, residual,
            (None if other < 0 else other for other in residual_site),
            zip(activation, slope, strict=True),
            strict=True,
        )
    ]  # fmt: skip
    taking_part = {i: name for i, name in enumerate(group) if name != NO_GROUP}
    xs = {i: dense(sites[i].input) for i in taking_part}
    fused = {i for i in taking_part if _joins_phases(i, sites, xs, taking_part[i])}
    results: dict[int, Tensor] = {}
    if taking_part:
        place = {i: index for index, i in enumerate(taking_part)}
        members = [_member(sites[i], place) if i in fused else sites[i].alone() for i in place]
        with below_autograd(), hidden_from_policies():
            totals = end_all_reduce_sum(pending, sum(2 * x.size(1) + 1 for x in xs.values()))
        group_name = next(iter(taking_part.values()))
        ys = normalize_sites(_counted(members), list(xs.values()), totals, group_name)
        results.update(zip(taking_part, ys, strict=True))
    for i, site in enumerate(sites):
        if i not in results:
            results[i] = BATCH_NORM(*site.arguments(NO_GROUP))
        if i not in fused:
            other = site.residual if site.residual_site is None else results[site.residual_site]
            results[i] = compose(results[i], other, *site.act, into[i])
    return [results[i] for i in range(len(sites))]


def _joins_phases(i: int, sites: Sequence[Site], xs: dict[int, Tensor], group: str) -> bool:
    """Whether what follows site ``i``, one of those with ``xs``, is part of its phases."""
    residual = sites[i].residual
    added = sites[i].residual_site
    if added is not None:
        if added not in xs or sites[added].has_epilogue:
            return False
        # The result of that site is laid out as its input.
        residual = xs[added]
    return joins_phases(xs[i], residual, sites[i].act[0], group)


def _member(site: Site, place: dict[int, int]) -> Site:
    """The site among those that take part."""
    if site.residual_site is None:
        return site
    return site._replace(residual_site=place[site.residual_site])


def _counted(sites: Sequence[Site]) -> Sequence[Site]:
    """The sites after one call has counted the batch for all of them, where one call can.

    Cumulative averages need the count of their own evaluation, and an empty batch, one that is not
    finite or one that is evaluated again may not count, which only kernels know.
    """
    if recomputes():
        return sites
    counters: dict[int, Tensor] = {}
    for site in sites:
        counter = site.running[2]
        # Of a counter that is no plain tensor a compiler makes a graph.
        if counter is None or type(counter) is not Tensor:
            return sites
        if site.momentum is None or site.input.numel() == 0 or site.skip_nonfinite:
            return sites
        counters[id(counter)] = counter
    if len(counters) < len(sites):
        return sites
    torch._foreach_add_(list(counters.values()), 1)
    return [site._replace(num_batches_tracked=None) for site in sites]


define_composite("start_batch_norm", _start_batch_norm)
define_composite("finish_batch_norm", _finish_batch_norm)

START_BATCH_NORM = torch.ops.bnrewrite.start_batch_norm.default
FINISH_BATCH_NORM = torch.ops.bnrewrite.finish_batch_norm.default
