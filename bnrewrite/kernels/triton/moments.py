"""Moments: x is read once. Bytes: that of x, and 8 * (2C + 1) of the result."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# Triton reads the annotations of a kernel as the types of its arguments.

import triton
import triton.language as tl

from bnrewrite.kernels.triton.tiles import (
    count_tiles,
    gdc_wait,
    is_last_to_store,
    merged,
    of_channels,
    sizes,
    sums_of,
    tile,
)


@triton.jit
def _store(
    packed: tl.tensor,
    pairs: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    C: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    """Stores both sums of the channels from ``first`` to ``end``."""
    sum_x, sum_xx = tl.split(pairs)
    c = first + tl.arange(0, WIDTH)
    tl.store(packed + 1 + c, sum_x, mask=c < end)
    tl.store(packed + 1 + C + c, sum_xx, mask=c < end)


@triton.jit(do_not_specialize=["N", "C", "S", "P"])
def moments_kernel(
    x: tl.tensor,
    partials: tl.tensor,
    arrivals: tl.tensor,
    packed: tl.tensor,
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
) -> None:
    """Packed sums of x, see :func:`bnrewrite.reference.moments`. Bytes: x read once.

    Sums are of differences from the mean of the program's first tile. That tile is one of the k
    that the program sums, so its mean is less than sqrt(k) standard deviations from theirs, and
    cancellation costs less than a factor k + 1, whatever the mean of x: usually about 1.

    Grid: blocks of columns, splits. MERGE is 0 if one program has all columns of a channel.
    """
    C, S, P, ROW = sizes(C, S, P, VEC, LAST, GROUP, FOLD)
    if TARGET == "early":
        gdc_wait()
    block = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    start, offsets, mask, count = tile(
        split, block, N, C, S, P, ROW, BLOCK_C, BLOCK_S, SPAN, VEC, LAST, GROUP
    )
    values = tl.load(x + start + offsets, mask=mask, other=0.0).to(ACC)
    pivot = (tl.sum(values, 1) / count.to(ACC))[:, None]
    centered = tl.where(mask, values - pivot, 0.0)
    sums = centered
    squares = centered * centered
    last = count_tiles(N, S, BLOCK_S, SPAN)
    for t in tl.range(split + num_splits, last, num_splits, num_stages=STAGES):
        start, offsets, mask, size = tile(
            t, block, N, C, S, P, ROW, BLOCK_C, BLOCK_S, SPAN, VEC, LAST, GROUP
        )
        values = tl.load(x + start + offsets, mask=mask, other=0.0).to(ACC)
        centered = tl.where(mask, values - pivot, 0.0)
        sums += centered
        squares += centered * centered
        count += size
    n = count.to(tl.float64)
    # One division: each takes a thread as long as all the rest that it does for its channels.
    share = 1.0 / n
    rest = tl.sum(sums, 1).to(tl.float64)
    mean = tl.sum(pivot, 1).to(tl.float64) + rest * share
    total = n * mean
    square = tl.sum(squares, 1).to(tl.float64) - rest * (rest * share) + total * mean
    sum_x = of_channels(total, P, BLOCK_C, GROUP, WIDE)
    sum_xx = of_channels(square, P, BLOCK_C, GROUP, WIDE)
    pairs = tl.join(sum_x, sum_xx)
    WIDTH: tl.constexpr = sum_x.shape[0]
    COLUMNS = C * P if FOLD else C
    first, end = sums_of(block, COLUMNS, BLOCK_C, GROUP)
    if MERGE:
        if is_last_to_store(
            pairs, pairs, partials, arrivals, first, end, COLUMNS, WIDTH, FOLD, False, TARGET
        ):
            if FOLD:
                for c in range(0, C, WIDE):
                    merge = merged(partials, c, C, C, num_splits * P, WIDE, MERGE)
                    _store(packed, merge, c, C, C, WIDE)
            else:
                merge = merged(partials, first, end, C, num_splits, WIDTH, MERGE)
                _store(packed, merge, first, end, C, WIDTH)
    else:
        _store(packed, pairs, first, end, C, WIDTH)
    if (block == 0) & (split == 0):
        tl.store(packed, (N * S * P).to(tl.float64))
