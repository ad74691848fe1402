"""The reduction of the backward: g and x are read once, and what the activation needs besides."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false
# Triton reads the annotations of a kernel as the types of its arguments.

import triton
import triton.language as tl

from bnrewrite.kernels.triton.activations import activation_backward
from bnrewrite.kernels.triton.tiles import (
    channels,
    count_tiles,
    gdc_wait,
    is_last_to_store,
    merged,
    of_channels,
    per_channel,
    sizes,
    sums_of,
    tile,
)


@triton.jit
def _store(
    sums: tl.tensor,
    gradients: tl.tensor | None,
    pairs: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    C: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    """Stores both sums of the channels from ``first`` to ``end``.

    Again as gradients of bias and weight, if these are wanted.
    """
    total, total_x = tl.split(pairs)
    c = first + tl.arange(0, WIDTH)
    mask = c < end
    tl.store(sums + c, total, mask=mask)
    tl.store(sums + C + c, total_x, mask=mask)
    if gradients is not None:
        tl.store(gradients + c, total.to(gradients.dtype.element_ty), mask=mask)
        tl.store(gradients + C + c, total_x.to(gradients.dtype.element_ty), mask=mask)


@triton.jit
def _store_other(
    sums: tl.tensor,
    gradients: tl.tensor | None,
    pairs: tl.tensor,
    third: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    C: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    """The same of the other branch, whose first sum is that of the first."""
    total, _ = tl.split(pairs)
    total_x, _ = tl.split(third)
    _store(sums, gradients, tl.join(total, total_x), first, end, C, WIDTH)


@triton.jit(do_not_specialize=["N", "C", "S", "P"])
def normalize_backward_reduce_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    stats: tl.tensor,
    weight: tl.tensor | None,
    bias: tl.tensor | None,
    sums: tl.tensor,
    gradients: tl.tensor | None,
    other: tl.tensor | None,
    other_stats: tl.tensor | None,
    other_weight: tl.tensor | None,
    other_bias: tl.tensor | None,
    other_sums: tl.tensor | None,
    other_gradients: tl.tensor | None,
    kept: tl.tensor | None,
    grad_residual: tl.tensor | None,
    partials: tl.tensor,
    arrivals: tl.tensor,
    slope: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    P: tl.int64,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPAN: tl.constexpr,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    MERGE: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """Sums of g and of g * xhat, see :func:`bnrewrite.reference.normalize_backward_reduce`.

    With ``other``, the second input of :func:`bnrewrite.two_branches.normalize_two`, its sums too.

    Bytes: g, x and ``other`` read once. With an activation after a residual, ``kept`` is read too:
    what was activated, or the result of a ReLU; without it, what was activated is computed again.
    ``grad_residual``, the gradient of that, is written where it is given, and so are
    ``gradients``: the sums again, as the gradients of bias and weight.

    Grid: blocks of columns, splits. MERGE is 0 if one program has all columns of a channel.
    """
    C, S, P, ROW = sizes(C, S, P, VEC, LAST, GROUP, FOLD)
    if TARGET == "early":
        gdc_wait()
    block = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    c, c_mask = channels(block, C, P, BLOCK_C, GROUP, FOLD)
    mean = per_channel(stats, c, c_mask, ACC, 0.0)
    rstd = per_channel(stats + C, c, c_mask, ACC, 0.0)
    scale = rstd * per_channel(weight, c, c_mask, ACC, 1.0)
    shift = per_channel(bias, c, c_mask, ACC, 0.0)
    sum_g = tl.zeros((BLOCK_C, BLOCK_S), ACC)
    sum_gx = tl.zeros((BLOCK_C, BLOCK_S), ACC)
    if other is not None:
        other_mean = per_channel(other_stats, c, c_mask, ACC, 0.0)
        other_rstd = per_channel(other_stats + C, c, c_mask, ACC, 0.0)
        other_scale = other_rstd * per_channel(other_weight, c, c_mask, ACC, 1.0)
        shift += per_channel(other_bias, c, c_mask, ACC, 0.0)
        sum_go = tl.zeros((BLOCK_C, BLOCK_S), ACC)
    last = count_tiles(N, S, BLOCK_S, SPAN)
    for t in tl.range(split, last, num_splits, num_stages=STAGES):
        start, offsets, mask, _ = tile(
            t, block, N, C, S, P, ROW, BLOCK_C, BLOCK_S, SPAN, VEC, LAST, GROUP
        )
        g = tl.load(grad + start + offsets, mask=mask, other=0.0).to(ACC)
        centered = tl.load(x + start + offsets, mask=mask, other=0.0).to(ACC) - mean
        if other is not None:
            o_centered = tl.load(other + start + offsets, mask=mask, other=0.0).to(ACC) - other_mean
        if ACTIVATION != "identity":
            if kept is not None:
                z = tl.load(kept + start + offsets, mask=mask, other=0.0).to(ACC)
            else:
                z = centered * scale + shift
                if other is not None:
                    z += o_centered * other_scale
            g = activation_backward(g, z, slope, ACTIVATION)
        if grad_residual is not None:
            tl.store(
                grad_residual + start + offsets, g.to(grad_residual.dtype.element_ty), mask=mask
            )
        sum_g += g
        # Where g is masked it is zero, and the mean of a channel is finite or spoils it anyway.
        sum_gx += tl.where(mask, g * centered, 0.0)
        if other is not None:
            sum_go += tl.where(mask, g * o_centered, 0.0)
    total = tl.sum(sum_g, 1).to(tl.float64)
    total_x = (tl.sum(sum_gx, 1) * tl.sum(rstd, 1)).to(tl.float64)
    sum_of_g = of_channels(total, P, BLOCK_C, GROUP, WIDE)
    sum_of_gx = of_channels(total_x, P, BLOCK_C, GROUP, WIDE)
    pairs = tl.join(sum_of_g, sum_of_gx)
    third = pairs
    if other is not None:
        total_o = (tl.sum(sum_go, 1) * tl.sum(other_rstd, 1)).to(tl.float64)
        sum_of_go = of_channels(total_o, P, BLOCK_C, GROUP, WIDE)
        third = tl.join(sum_of_go, sum_of_go)
    WIDTH: tl.constexpr = sum_of_g.shape[0]
    COLUMNS = C * P if FOLD else C
    first, end = sums_of(block, COLUMNS, BLOCK_C, GROUP)
    if MERGE:
        THIRD: tl.constexpr = other is not None
        if is_last_to_store(
            pairs, third, partials, arrivals, first, end, COLUMNS, WIDTH, FOLD, THIRD, TARGET
        ):
            thirds = partials + num_splits * 2 * COLUMNS
            if FOLD:
                for low in range(0, C, WIDE):
                    both = merged(partials, low, C, C, num_splits * P, WIDE, MERGE)
                    _store(sums, gradients, both, low, C, C, WIDE)
                    if other is not None:
                        others = merged(thirds, low, C, C, num_splits * P, WIDE, MERGE)
                        _store_other(other_sums, other_gradients, both, others, low, C, C, WIDE)
            else:
                both = merged(partials, first, end, C, num_splits, WIDTH, MERGE)
                _store(sums, gradients, both, first, end, C, WIDTH)
                if other is not None:
                    others = merged(thirds, first, end, C, num_splits, WIDTH, MERGE)
                    _store_other(other_sums, other_gradients, both, others, first, end, C, WIDTH)
    else:
        _store(sums, gradients, pairs, first, end, C, WIDTH)
        if other is not None:
            _store_other(other_sums, other_gradients, pairs, third, first, end, C, WIDTH)
