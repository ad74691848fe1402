"""Device functions that all kernels share: addressing of tiles, per-channel values."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# Triton reads the annotations of a kernel as the types of its arguments.

import triton
import triton.language as tl


@triton.jit
def sizes(
    C: tl.tensor,
    S: tl.tensor,
    P: tl.tensor,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tuple:
    """C, S, P and the length of a row from what a kernel was given; see ``Plan.sizes``.

    The length is a product with VEC, which tells the compiler how wide its accesses may be.
    """
    C = tl.cast(C, tl.int64)
    S = tl.cast(S, tl.int64)
    if GROUP:
        return C, S, tl.cast(P, tl.int32), C * P // VEC * VEC
    elif LAST:
        return C * VEC, S, 1, C * VEC
    else:
        # Triton compiles what follows a conditional return, too.
        return C, S * VEC, 1, S * VEC


@triton.jit
def channels(
    block: tl.tensor, C: tl.tensor, P: tl.tensor, BLOCK_C: tl.constexpr, GROUP: tl.constexpr
) -> tl.tuple:
    """Channel numbers (BLOCK_C,) of the columns of a block, int64, and which columns exist."""
    column = tl.arange(0, BLOCK_C)
    if GROUP:
        c = tl.cast(block, tl.int64) * GROUP + column // P
        return c, (column < GROUP * P) & (c < C)
    else:
        c = tl.cast(block, tl.int64) * BLOCK_C + column
        return c, c < C


@triton.jit
def tile(
    t: tl.tensor,
    block: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    P: tl.tensor,
    ROW: tl.tensor,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tuple:
    """Where tile ``t`` of a block is: offset, offsets in it, mask, number of positions.

    The first is an int64 scalar. The second (BLOCK_C, BLOCK_S) is int32, which the host has
    checked to suffice; 64 bits would cost registers. ``t`` is int32, as the host has checked too.
    """
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    if LAST:
        width = GROUP * P // VEC * VEC if GROUP else BLOCK_C
        first_c = tl.cast(block, tl.int64) * width
        first = tl.cast(t, tl.int64) * BLOCK_S
        start = first * ROW + first_c
        offsets = s * ROW.to(tl.int32) + c
        mask = (first_c + c < ROW) & (first + s < S)
        if GROUP:
            mask = mask & (c < width)
    else:
        first_c = tl.cast(block, tl.int64) * BLOCK_C
        num_parts = tl.cdiv(S, BLOCK_S).to(tl.int32)
        first = tl.cast(t % num_parts, tl.int64) * BLOCK_S
        start = (tl.cast(t // num_parts, tl.int64) * C + first_c) * S + first
        offsets = c * S.to(tl.int32) + s
        mask = (first_c + c < C) & (first + s < S)
    return start, offsets, mask, tl.minimum(S - first, BLOCK_S)


@triton.jit
def of_channels(
    values: tl.tensor, P: tl.tensor, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """What the columns of each channel add up to: (WIDE,) from (BLOCK_C,), or ``values``."""
    if GROUP:
        channel = tl.arange(0, BLOCK_C) // P
        mine = channel[None, :] == tl.arange(0, WIDE)[:, None]
        return tl.sum(tl.where(mine, values[None, :], 0.0), 1)
    else:
        return values


@triton.jit
def sums_of(
    block: tl.tensor, C: tl.tensor, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr
) -> tl.tuple:
    """Channel numbers of what :func:`of_channels` gives, int64, and which of them exist."""
    if GROUP:
        one = tl.arange(0, WIDE)
        c = tl.cast(block, tl.int64) * GROUP + one
        return c, (one < GROUP) & (c < C)
    else:
        c = tl.cast(block, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        return c, c < C


@triton.jit
def mean_and_var(totals: tl.tensor, c: tl.tensor, mask: tl.tensor, C: tl.tensor) -> tl.tuple:
    """Mean and biased variance, float64, of channels ``c`` from packed sums; zero if none."""
    share = 1.0 / tl.maximum(tl.load(totals), 1.0)
    mean = tl.load(totals + 1 + c, mask=mask, other=0.0) * share
    square = tl.load(totals + 1 + C + c, mask=mask, other=0.0) * share
    var = square - mean * mean
    # Not tl.maximum, which would turn NaN into 0.
    return mean, tl.where(var < 0, 0.0, var)


@triton.jit
def per_channel(
    values: tl.tensor, c: tl.tensor, mask: tl.tensor, ACC: tl.constexpr, DEFAULT: tl.constexpr
) -> tl.tensor:
    """``values`` of channels ``c`` in ACC, (BLOCK_C, 1); DEFAULT where there are none."""
    if values is None:
        return tl.full(c.shape, DEFAULT, ACC)[:, None]
    else:
        return tl.load(values + c, mask=mask, other=0.0).to(ACC)[:, None]


@triton.jit
def over_splits(
    a: tl.tensor,
    b: tl.tensor,
    other: tl.tensor,
    partials: tl.tensor,
    arrivals: tl.tensor,
    c: tl.tensor,
    mask: tl.tensor,
    C: tl.tensor,
    block: tl.tensor,
    split: tl.tensor,
    num_splits: tl.tensor,
    ROWS: tl.constexpr,
    MERGE: tl.constexpr,
) -> tl.tuple:
    """The sums of ``a``, ``b`` and ``other`` over all splits, and whether this program has them.

    It is the one that is the last to store its partial sums (splits, ROWS, C); ``other`` is a sum
    if there are three rows. MERGE is 0 if there is one split.
    """
    if MERGE:
        row = partials + split * ROWS * C + c
        tl.store(row, a, mask=mask)
        tl.store(row + C, b, mask=mask)
        if ROWS == 3:
            tl.store(row + 2 * C, other, mask=mask)
        last = _is_last(arrivals, block, num_splits)
        if last:
            a, b = _merged(partials, ROWS, c, mask, C, num_splits, MERGE)
            if ROWS == 3:
                other = _merged_third(partials, c, mask, C, num_splits, MERGE)
        return a, b, other, last
    else:
        return a, b, other, True


@triton.jit
def _is_last(arrivals: tl.tensor, block: tl.tensor, num_splits: tl.tensor) -> tl.tensor:
    """Whether all other splits of a channel block have stored their partial sums.

    The counter is back at zero afterwards, for the next launch on the stream.
    """
    # All threads have stored before the one that announces it.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + block, 1, sem="acq_rel", scope="gpu")
    last = arrived == num_splits - 1
    if last:
        tl.store(arrivals + block, 0)
    return last


@triton.jit
def _merged(
    partials: tl.tensor,
    ROWS: tl.constexpr,
    c: tl.tensor,
    mask: tl.tensor,
    C: tl.tensor,
    num_splits: tl.tensor,
    MERGE: tl.constexpr,
) -> tl.tuple:
    """Sums over splits of the first two rows of partials (splits, ROWS, C), in a fixed order."""
    a = tl.zeros((MERGE, c.shape[0]), tl.float64)
    b = tl.zeros((MERGE, c.shape[0]), tl.float64)
    for first in range(0, num_splits, MERGE):
        k = first + tl.arange(0, MERGE)
        row = partials + k[:, None] * ROWS * C + c[None, :]
        exists = (k < num_splits)[:, None] & mask[None, :]
        # Other programs wrote them: not from the cache of this multiprocessor.
        a += tl.load(row, mask=exists, other=0.0, cache_modifier=".cg")
        b += tl.load(row + C, mask=exists, other=0.0, cache_modifier=".cg")
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _merged_third(
    partials: tl.tensor,
    c: tl.tensor,
    mask: tl.tensor,
    C: tl.tensor,
    num_splits: tl.tensor,
    MERGE: tl.constexpr,
) -> tl.tensor:
    """As :func:`_merged`, the last of three rows."""
    total = tl.zeros((MERGE, c.shape[0]), tl.float64)
    for first in range(0, num_splits, MERGE):
        k = first + tl.arange(0, MERGE)
        row = partials + (k[:, None] * 3 + 2) * C + c[None, :]
        exists = (k < num_splits)[:, None] & mask[None, :]
        total += tl.load(row, mask=exists, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)
