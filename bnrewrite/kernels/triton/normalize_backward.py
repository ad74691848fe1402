"""The input gradient: g and x are read and dx is written, in one pass."""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# Triton reads the annotations of a kernel as the types of its arguments.

import triton
import triton.language as tl

from bnrewrite.kernels.triton.activations import activation_backward
from bnrewrite.kernels.triton.tiles import channels, per_channel, sizes, tile


@triton.jit(do_not_specialize=["N", "C", "S"])
def normalize_backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    kept: tl.tensor | None,
    dx: tl.tensor,
    stats: tl.tensor,
    totals: tl.tensor,
    weight: tl.tensor | None,
    bias: tl.tensor | None,
    sums: tl.tensor,
    slope: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEPT_RESULT: tl.constexpr,
) -> None:
    """The input gradient, see :func:`bnrewrite.reference.normalize_backward`.

    Bytes: g and x read once, dx written once. With an activation after a residual whose gradient
    nobody wants, ``kept`` is read too, as in the reduction; where the reduction has written the
    gradient of what was activated, that is ``grad``, and the activation is "identity".

    Grid: channel blocks, splits.
    """
    C, S = sizes(C, S, VEC, LAST)
    block = tl.program_id(0)
    c, c_mask = channels(block, C, BLOCK_C)
    mean = per_channel(stats, c, c_mask, ACC, 0.0)
    rstd = per_channel(stats + C, c, c_mask, ACC, 0.0)
    scale = rstd * per_channel(weight, c, c_mask, ACC, 1.0)
    shift = per_channel(bias, c, c_mask, ACC, 0.0)
    share = 1.0 / tl.maximum(tl.load(totals), 1.0)
    mean_g = (tl.load(sums + c, mask=c_mask, other=0.0) * share).to(ACC)[:, None]
    mean_gx = (tl.load(sums + C + c, mask=c_mask, other=0.0) * share).to(ACC)[:, None]
    slope_x = rstd * mean_gx
    last = (N * tl.cdiv(S, BLOCK_S)).to(tl.int32)
    for t in range(tl.program_id(1), last, tl.num_programs(1)):
        start, offsets, mask, _ = tile(t, block, C, S, BLOCK_C, BLOCK_S, LAST)
        g = tl.load(grad + start + offsets, mask=mask, other=0.0).to(ACC)
        centred = tl.load(x + start + offsets, mask=mask, other=0.0).to(ACC) - mean
        if ACTIVATION != "identity":
            if KEPT_RESULT:
                z = tl.load(kept + start + offsets, mask=mask, other=0.0).to(ACC)
            else:
                z = centred * scale + shift
                if kept is not None:
                    z += tl.load(kept + start + offsets, mask=mask, other=0.0).to(ACC)
            g = activation_backward(g, z, slope, ACTIVATION)
        gradient = scale * (g - mean_g - centred * slope_x)
        tl.store(dx + start + offsets, gradient.to(dx.dtype.element_ty), mask=mask)
