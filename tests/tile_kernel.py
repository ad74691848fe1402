"""A kernel that tells which addresses a tile covers, for sizes that no memory holds."""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# Triton reads the annotations of a kernel as the types of its arguments.

import triton
import triton.language as tl

from bnrewrite.kernels.triton.tiles import sizes, tile


@triton.jit(do_not_specialize=["N", "C", "S", "P", "t", "block"])
def addresses_kernel(
    result: tl.tensor,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    P: tl.int64,
    t: tl.int32,
    block: tl.int32,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPAN: tl.constexpr,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
) -> None:
    """Addresses of tile ``t`` of a block of columns, -1 where there is nothing."""
    C, S, P, ROW = sizes(C, S, P, VEC, LAST, GROUP, FOLD)
    start, offsets, mask, _ = tile(
        t, block, N, C, S, P, ROW, BLOCK_C, BLOCK_S, SPAN, VEC, LAST, GROUP
    )
    place = tl.arange(0, BLOCK_C)[:, None] * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    tl.store(result + place, tl.where(mask, start + offsets, -1))
