"""Device functions that all kernels share: addressing of tiles, per-channel values."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# Triton reads the annotations of a kernel as the types of its arguments.

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:
    # A Triton that was built for AMD alone, where no kernel asks for it.
    gdc_wait = None


@triton.jit
def sizes(
    C: tl.tensor,
    S: tl.tensor,
    P: tl.tensor,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
) -> tl.tuple:
    """C, S, P and the length of a row from what a kernel was given; see ``Plan.sizes``.

    The length is a product with VEC, which tells the compiler how wide its accesses may be.
    """
    C = tl.cast(C, tl.int64)
    S = tl.cast(S, tl.int64)
    if GROUP or FOLD:
        return C, S, tl.cast(P, tl.int32), C * P // VEC * VEC
    elif LAST:
        return C * VEC, S, 1, C * VEC
    else:
        # Triton compiles what follows a conditional return, too.
        return C, S * VEC, 1, S * VEC


@triton.jit
def channels(
    block: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
) -> tl.tuple:
    """Channel numbers (BLOCK_C,) of the columns of a block, int64, and which columns exist."""
    column = tl.arange(0, BLOCK_C)
    if GROUP:
        c = tl.cast(block, tl.int64) * GROUP + column // P
        return c, (column < GROUP * P) & (c < C)
    elif FOLD:
        # Columns of all blocks have numbers of 32 bits, as the host has checked.
        column += block * BLOCK_C
        channel_count = C.to(tl.int32)
        return tl.cast(column % channel_count, tl.int64), column < channel_count * P
    else:
        c = tl.cast(block, tl.int64) * BLOCK_C + column
        return c, c < C


@triton.jit
def count_tiles(N: tl.tensor, S: tl.tensor, BLOCK_S: tl.constexpr, SPAN: tl.constexpr) -> tl.tensor:
    """Tiles of a block of columns, int32, as the host has checked to suffice."""
    return (tl.cdiv(N, BLOCK_S // SPAN) * tl.cdiv(S, SPAN)).to(tl.int32)


@triton.jit
def tile(
    t: tl.tensor,
    block: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    S: tl.tensor,
    P: tl.tensor,
    ROW: tl.tensor,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPAN: tl.constexpr,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tuple:
    """Where tile ``t`` of a block is: offset, offsets in it, mask, number of positions.

    The first is an int64 scalar. The second (BLOCK_C, BLOCK_S) is int32, which the host has
    checked to suffice; 64 bits would cost registers. ``t`` is int32, as the host has checked too.
    The mask compares 32 bits for each VEC, because it is computed as often as values are.
    """
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    if LAST:
        width = GROUP * P // VEC * VEC if GROUP else BLOCK_C
        first_c = tl.cast(block, tl.int64) * width
        first = tl.cast(t, tl.int64) * BLOCK_S
        start = first * ROW + first_c
        offsets = s * ROW.to(tl.int32) + c
        left_c = tl.minimum(ROW - first_c, BLOCK_C).to(tl.int32)
        left = tl.minimum(S - first, BLOCK_S).to(tl.int32)
        mask = (c // VEC < left_c // VEC) & (s < left)
        if GROUP:
            mask = mask & (c < width)
    else:
        IMAGES: tl.constexpr = BLOCK_S // SPAN
        first_c = tl.cast(block, tl.int64) * BLOCK_C
        num_parts = tl.cdiv(S, SPAN).to(tl.int32)
        first = tl.cast(t % num_parts, tl.int64) * SPAN
        first_n = tl.cast(t // num_parts, tl.int64) * IMAGES
        start = (first_n * C + first_c) * S + first
        offsets = c * S.to(tl.int32) + s % SPAN
        left_c = tl.minimum(C - first_c, BLOCK_C).to(tl.int32)
        left = tl.minimum(S - first, SPAN).to(tl.int32)
        # In this order, which lets the compiler see that VEC neighbors are alike.
        mask = (c < left_c) & ((s // VEC) % (SPAN // VEC) < left // VEC)
        if IMAGES > 1:
            image = s // SPAN
            offsets += image * (C * S).to(tl.int32)
            left_n = tl.minimum(N - first_n, IMAGES).to(tl.int32)
            mask = mask & (image < left_n)
            left *= left_n
    return start, offsets, mask, left


@triton.jit
def of_channels(
    values: tl.tensor, P: tl.tensor, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """What the columns of each channel of a group add up to: (WIDE,), or ``values`` (BLOCK_C,)."""
    if GROUP:
        channel = tl.arange(0, BLOCK_C) // P
        mine = channel[None, :] == tl.arange(0, WIDE)[:, None]
        return tl.sum(tl.where(mine, values[None, :], 0.0), 1)
    else:
        return values


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
def rstd_of(var: tl.tensor, eps: tl.float64, ACC: tl.constexpr) -> tl.tensor:
    """1 / sqrt(var + eps) in ACC, of ``var`` in float64.

    The root of float64 is a function of its own that a thread calls for each channel. That of
    float32 is one instruction, whose last bits a step of Newton's method makes right; numbers
    beyond its range are scaled.
    """
    square = var + eps
    if ACC == tl.float64:  # noqa: SIM300
        return tl.rsqrt(square)
    else:
        is_small = square < 2.0**-100
        is_large = square > 2.0**100
        scale = tl.where(is_small, 2.0**160, tl.where(is_large, 2.0**-160, 1.0).to(tl.float64))
        back = tl.where(is_small, 2.0**80, tl.where(is_large, 2.0**-80, 1.0))
        scaled = (square * scale).to(tl.float32)
        root = tl.rsqrt(scaled)
        better = root + root * (0.5 - 0.5 * scaled * root * root)
        # There is none for zero and infinity.
        return tl.where(better == better, better, root) * back


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
def sums_of(
    block: tl.tensor, COLUMNS: tl.tensor, BLOCK_C: tl.constexpr, GROUP: tl.constexpr
) -> tl.tuple:
    """The first of what :func:`of_channels` gives, of COLUMNS for all blocks, and the end."""
    width = GROUP if GROUP else BLOCK_C
    first = tl.cast(block, tl.int64) * width
    return first, tl.minimum(first + width, COLUMNS)


@triton.jit
def is_last_to_store(
    pairs: tl.tensor,
    third: tl.tensor,
    partials: tl.tensor,
    arrivals: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    COLUMNS: tl.tensor,
    WIDTH: tl.constexpr,
    FOLD: tl.constexpr,
    THIRD: tl.constexpr,
    TARGET: tl.constexpr,
) -> tl.tensor:
    """Stores ``pairs`` and ``third``; whether all others with which they are added have, too.

    Both are (WIDTH, 2), of the columns from ``first`` to ``end``; only THIRD says whether there is
    a ``third``. They are added to those of the other splits, if rows are folded of all blocks: the
    columns of a channel are C apart then.
    """
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    # Each pair is next to its neighbors': one wide access, and one sum in place of two.
    place = first * 2 + tl.arange(0, 2 * WIDTH)
    exists = place < end * 2
    row = partials + split * 2 * COLUMNS + place
    tl.store(row, tl.reshape(pairs, (2 * WIDTH,)), mask=exists)
    if THIRD:
        row += num_splits * 2 * COLUMNS
        tl.store(row, tl.reshape(third, (2 * WIDTH,)), mask=exists)
    if TARGET == "cdna":
        _wait_for_stores(tl.arange(0, 2 * WIDTH))
    if FOLD:
        return _is_last(arrivals, num_splits * tl.num_programs(0))
    else:
        return _is_last(arrivals + tl.program_id(0), num_splits)


@triton.jit
def _wait_for_stores(values: tl.tensor) -> tl.tensor:
    """``values``, once each wave that holds some has stored what it began to store.

    On AMD's CDNA neither a barrier waits for that, nor the release of another wave. Elsewhere one
    of them does.
    """
    return tl.inline_asm_elementwise(
        "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1", "=v,v", [values], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _is_last(counter: tl.tensor, number: tl.tensor) -> tl.tensor:
    """Whether so many programs, this one included, have stored their partial sums.

    The counter is back at zero afterwards, for the next launch on the stream.
    """
    # All threads have stored before the one that announces it.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = arrived == number - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def merged(
    partials: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    C: tl.tensor,
    num_rows: tl.tensor,
    WIDTH: tl.constexpr,
    MERGE: tl.constexpr,
) -> tl.tensor:
    """Sums over rows of partials (num_rows, C, 2), in a fixed order: (WIDTH, 2)."""
    place = first * 2 + tl.arange(0, 2 * WIDTH)[None, :]
    exists = place < end * 2
    total = tl.zeros((MERGE, 2 * WIDTH), tl.float64)
    for row in range(0, num_rows, MERGE):
        k = row + tl.arange(0, MERGE)[:, None]
        # Other programs wrote them: not from the cache of this multiprocessor.
        total += tl.load(
            partials + k * 2 * C + place,
            mask=(k < num_rows) & exists,
            other=0.0,
            cache_modifier=".cg",
        )
    return tl.reshape(tl.sum(total, 0), (WIDTH, 2))
