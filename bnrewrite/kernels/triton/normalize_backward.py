"""The input gradient: g and x are read and dx is written, in one pass."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportReturnType=false, reportPossiblyUnboundVariable=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false
# Triton reads the annotations of a kernel as the types of its arguments.

import triton
import triton.language as tl

from bnrewrite.kernels.triton.activations import activation_backward
from bnrewrite.kernels.triton.tiles import (
    channels,
    count_tiles,
    gdc_wait,
    per_channel,
    sizes,
    tile,
)


@triton.jit
def _coefficients(
    stats: tl.tensor,
    totals: tl.tensor,
    weight: tl.tensor | None,
    sums: tl.tensor,
    c: tl.tensor,
    mask: tl.tensor,
    C: tl.tensor,
    ACC: tl.constexpr,
) -> tl.tuple:
    """Mean, scale, mean of g and the factor of the centered input, (BLOCK_C, 1) each, of ``c``."""
    mean = per_channel(stats, c, mask, ACC, 0.0)
    rstd = per_channel(stats + C, c, mask, ACC, 0.0)
    scale = rstd * per_channel(weight, c, mask, ACC, 1.0)
    share = 1.0 / tl.maximum(tl.load(totals), 1.0)
    mean_g = (tl.load(sums + c, mask=mask, other=0.0) * share).to(ACC)[:, None]
    mean_gx = (tl.load(sums + C + c, mask=mask, other=0.0) * share).to(ACC)[:, None]
    return mean, scale, mean_g, rstd * mean_gx


@triton.jit(do_not_specialize=["N", "C", "S", "P", "num_blocks"])
def normalize_backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    dx: tl.tensor,
    stats: tl.tensor,
    totals: tl.tensor,
    weight: tl.tensor | None,
    bias: tl.tensor | None,
    sums: tl.tensor,
    other: tl.tensor | None,
    other_dx: tl.tensor | None,
    other_stats: tl.tensor | None,
    other_totals: tl.tensor | None,
    other_weight: tl.tensor | None,
    other_bias: tl.tensor | None,
    other_sums: tl.tensor | None,
    kept: tl.tensor | None,
    slope: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    P: tl.int64,
    num_blocks: tl.int32,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPAN: tl.constexpr,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """The input gradient, see :func:`bnrewrite.reference.normalize_backward`.

    With ``other``, the second input of :func:`bnrewrite.two_branches.normalize_two`, its gradient,
    too.

    Bytes: g, x and ``other`` read once, their gradients written once. With an activation after a
    residual whose gradient nobody wants, ``kept`` is read too, as in the reduction; where the
    reduction has written the gradient of what was activated, that is ``grad``, and the activation
    is "identity".

    Grid: the splits of each of the ``num_blocks`` blocks of columns.
    """
    C, S, P, ROW = sizes(C, S, P, VEC, LAST, GROUP, FOLD)
    if TARGET == "early":
        gdc_wait()
    block = tl.program_id(0) % num_blocks
    c, c_mask = channels(block, C, P, BLOCK_C, GROUP, FOLD)
    mean, scale, mean_g, slope_x = _coefficients(stats, totals, weight, sums, c, c_mask, C, ACC)
    shift = per_channel(bias, c, c_mask, ACC, 0.0)
    if other is not None:
        other_mean, other_scale, other_mean_g, other_slope = _coefficients(
            other_stats, other_totals, other_weight, other_sums, c, c_mask, C, ACC
        )
        shift += per_channel(other_bias, c, c_mask, ACC, 0.0)
    num_splits = tl.num_programs(0) // num_blocks
    last = count_tiles(N, S, BLOCK_S, SPAN)
    for t in tl.range(tl.program_id(0) // num_blocks, last, num_splits, num_stages=STAGES):
        start, offsets, mask, _ = tile(
            last - 1 - t, block, N, C, S, P, ROW, BLOCK_C, BLOCK_S, SPAN, VEC, LAST, GROUP
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
        gradient = scale * (g - mean_g - centered * slope_x)
        tl.store(dx + start + offsets, gradient.to(dx.dtype.element_ty), mask=mask)
        if other is not None:
            gradient = other_scale * (g - other_mean_g - o_centered * other_slope)
            tl.store(other_dx + start + offsets, gradient.to(other_dx.dtype.element_ty), mask=mask)
