"""Device functions that all kernels share: addressing of tiles, per-channel values."""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# Triton reads the annotations of a kernel as the types of its arguments.

import triton
import triton.language as tl


@triton.jit
def sizes(C: tl.tensor, S: tl.tensor, VEC: tl.constexpr, LAST: tl.constexpr) -> tl.tuple:
    """C and S from what a kernel was given, where the dimension along memory counts vectors.

    The product tells the compiler by what that dimension divides, so that accesses are as wide.
    """
    C = tl.cast(C, tl.int64)
    S = tl.cast(S, tl.int64)
    if LAST:
        return C * VEC, S
    else:
        # Triton compiles what follows a conditional return, too.
        return C, S * VEC


@triton.jit
def channels(block: tl.tensor, C: tl.tensor, BLOCK_C: tl.constexpr) -> tl.tuple:
    """Channel numbers (BLOCK_C,) of a block, int64, and which of them exist."""
    c = tl.cast(block, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < C


@triton.jit
def tile(
    t: tl.tensor,
    block: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LAST: tl.constexpr,
) -> tl.tuple:
    """Where tile ``t`` of a channel block is: offset, offsets in it, mask, number of positions.

    The first is an int64 scalar. The second (BLOCK_C, BLOCK_S) is int32, which the host has
    checked to suffice; 64 bits would cost registers. ``t`` is int32, as the host has checked too.
    """
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    first_c = tl.cast(block, tl.int64) * BLOCK_C
    if LAST:
        first = tl.cast(t, tl.int64) * BLOCK_S
        start = first * C + first_c
        offsets = s * C.to(tl.int32) + c
    else:
        num_parts = tl.cdiv(S, BLOCK_S).to(tl.int32)
        first = tl.cast(t % num_parts, tl.int64) * BLOCK_S
        start = (tl.cast(t // num_parts, tl.int64) * C + first_c) * S + first
        offsets = c * S.to(tl.int32) + s
    mask = (first_c + c < C) & (first + s < S)
    return start, offsets, mask, tl.minimum(S - first, BLOCK_S)


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
def is_last(arrivals: tl.tensor, block: tl.tensor, num_splits: tl.tensor) -> tl.tensor:
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
def merged(
    partials: tl.tensor,
    row: tl.constexpr,
    ROWS: tl.constexpr,
    c: tl.tensor,
    mask: tl.tensor,
    C: tl.tensor,
    num_splits: tl.tensor,
    MERGE: tl.constexpr,
) -> tl.tensor:
    """Sum over splits of row ``row`` of partials (splits, ROWS, C), in a fixed order."""
    total = tl.zeros(c.shape, tl.float64)
    for first in range(0, num_splits, MERGE):
        k = first + tl.arange(0, MERGE)
        values = tl.load(
            partials + (k[:, None] * ROWS + row) * C + c[None, :],
            mask=(k < num_splits)[:, None] & mask[None, :],
            other=0.0,
            # Other programs wrote them: not from the cache of this multiprocessor.
            cache_modifier=".cg",
        )
        total += tl.sum(values, 0)
    return total
