"""Normalization with all that belongs to it: x (and the residual) is read, y is written."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportReturnType=false, reportPossiblyUnboundVariable=false
# Triton reads the annotations of a kernel as the types of its arguments.

import triton
import triton.language as tl

from bnrewrite.kernels.triton.activations import activate
from bnrewrite.kernels.triton.tiles import (
    channels,
    count_tiles,
    gdc_wait,
    mean_and_var,
    per_channel,
    rstd_of,
    sizes,
    tile,
)

BOOK = 512
"""Channels that a program keeps the statistics of at a time."""


@triton.jit
def _move(running: tl.tensor, value: tl.tensor, factor: tl.tensor, mask: tl.tensor) -> None:
    """Running = (1 - factor) * running + factor * value, computed in float64."""
    before = tl.load(running, mask=mask, other=0.0)
    if running.dtype.element_ty != tl.float64:
        # There is no conversion between float64 and 16 bits.
        before = before.to(tl.float32)
    before = before.to(tl.float64)
    after = before + factor * (value - before)
    if running.dtype.element_ty != tl.float64:
        after = after.to(tl.float32)
    tl.store(running, after.to(running.dtype.element_ty), mask=mask)


@triton.jit
def _keep_books(
    totals: tl.tensor,
    stats: tl.tensor,
    running_mean: tl.tensor | None,
    running_var: tl.tensor | None,
    num_batches_tracked: tl.tensor | None,
    eps: tl.float64,
    momentum: tl.float64,
    C: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    CUMULATIVE: tl.constexpr,
    BOOK: tl.constexpr,
) -> None:
    """Writes stats and moves the running statistics, block by block of channels.

    A cumulative average reads the counter that is incremented here, so one program does it all.
    """
    count = tl.load(totals)
    factor = momentum
    if CUMULATIVE:
        # One thread stores the counter that all load: after the other site's store, if they share
        # it, and before their own.
        tl.debug_barrier()
        if num_batches_tracked is not None:
            factor = 1.0 / (tl.load(num_batches_tracked) + 1).to(tl.float64)
        else:
            factor = 0.0
    for block in range(first, tl.cdiv(C, BOOK).to(tl.int32), step):
        c, mask = channels(block, C, 1, BOOK, 0, False)
        mean, var = mean_and_var(totals, c, mask, C)
        tl.store(stats + c, mean.to(stats.dtype.element_ty), mask=mask)
        tl.store(stats + C + c, rstd_of(var, eps, stats.dtype.element_ty), mask=mask)
        if running_mean is not None:
            # Of scalars, because the interpreter cannot combine such a condition with a mask.
            moving = c < tl.where(count > 0, C, 0)
            _move(running_mean + c, mean, factor, moving)
            unbiased = var * (count / tl.maximum(count - 1.0, 1.0))
            _move(running_var + c, unbiased, factor, moving)
    if CUMULATIVE:
        tl.debug_barrier()
    # The first condition is one of the compiler's, the second one of the program's.
    if num_batches_tracked is not None:  # noqa: SIM102
        if first == 0:
            before = tl.load(num_batches_tracked)
            tl.store(num_batches_tracked, before + tl.where(count > 0, 1, 0))


@triton.jit
def _affine(
    totals: tl.tensor,
    weight: tl.tensor | None,
    bias: tl.tensor | None,
    eps: tl.float64,
    c: tl.tensor,
    mask: tl.tensor,
    C: tl.tensor,
    ACC: tl.constexpr,
) -> tl.tuple:
    """Mean, scale and shift of channels ``c``, (BLOCK_C, 1) each."""
    mean, var = mean_and_var(totals, c, mask, C)
    scale = rstd_of(var, eps, ACC)[:, None] * per_channel(weight, c, mask, ACC, 1.0)
    return mean.to(ACC)[:, None], scale, per_channel(bias, c, mask, ACC, 0.0)


@triton.jit(do_not_specialize=["N", "C", "S", "P", "num_blocks", "num_books"])
def normalize_kernel(
    x: tl.tensor,
    residual: tl.tensor | None,
    y: tl.tensor,
    total: tl.tensor | None,
    totals: tl.tensor,
    weight: tl.tensor | None,
    bias: tl.tensor | None,
    stats: tl.tensor,
    running_mean: tl.tensor | None,
    running_var: tl.tensor | None,
    num_batches_tracked: tl.tensor | None,
    other_totals: tl.tensor | None,
    other_weight: tl.tensor | None,
    other_bias: tl.tensor | None,
    other_stats: tl.tensor | None,
    other_running_mean: tl.tensor | None,
    other_running_var: tl.tensor | None,
    other_num_batches_tracked: tl.tensor | None,
    eps: tl.float64,
    momentum: tl.float64,
    other_eps: tl.float64,
    other_momentum: tl.float64,
    slope: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    P: tl.int64,
    num_blocks: tl.int32,
    num_books: tl.int32,
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
    CUMULATIVE: tl.constexpr,
    OTHER_CUMULATIVE: tl.constexpr,
    BOOK: tl.constexpr,
) -> None:
    """Y and stats, see :func:`bnrewrite.reference.normalize`; moves the running statistics.

    With ``other_totals`` the residual is normalized as well, on the way. ``total``, what is
    activated, is written where it is given.

    Bytes: x, and the residual if there is one, read once; y written once, and so is ``total``.

    Grid: ``num_books`` programs for what happens once per channel, then one for each of the splits
    of each of the ``num_blocks`` blocks of columns.
    """
    C, S, P, ROW = sizes(C, S, P, VEC, LAST, GROUP, FOLD)
    if TARGET == "early":
        gdc_wait()
    program = tl.program_id(0)
    if program < num_books:
        if other_totals is not None:
            _keep_books(
                other_totals, other_stats, other_running_mean, other_running_var,
                other_num_batches_tracked, other_eps, other_momentum, C, program, num_books,
                OTHER_CUMULATIVE, BOOK,
            )  # fmt: skip
        _keep_books(
            totals, stats, running_mean, running_var, num_batches_tracked, eps, momentum, C,
            program, num_books, CUMULATIVE, BOOK,
        )  # fmt: skip
    else:
        program -= num_books
        block = program % num_blocks
        num_splits = (tl.num_programs(0) - num_books) // num_blocks
        c, c_mask = channels(block, C, P, BLOCK_C, GROUP, FOLD)
        mean, scale, shift = _affine(totals, weight, bias, eps, c, c_mask, C, ACC)
        if other_totals is not None:
            other_mean, other_scale, other_shift = _affine(
                other_totals, other_weight, other_bias, other_eps, c, c_mask, C, ACC
            )
            shift += other_shift
        last = count_tiles(N, S, BLOCK_S, SPAN)
        for t in tl.range(program // num_blocks, last, num_splits, num_stages=STAGES):
            start, offsets, mask, _ = tile(
                last - 1 - t, block, N, C, S, P, ROW, BLOCK_C, BLOCK_S, SPAN, VEC, LAST, GROUP
            )
            z = (tl.load(x + start + offsets, mask=mask, other=0.0).to(ACC) - mean) * scale + shift
            if residual is not None:
                r = tl.load(residual + start + offsets, mask=mask, other=0.0).to(ACC)
                if other_totals is not None:
                    r = (r - other_mean) * other_scale
                z += r
            if total is not None:
                tl.store(total + start + offsets, z.to(total.dtype.element_ty), mask=mask)
            result = activate(z, slope, ACTIVATION)
            tl.store(y + start + offsets, result.to(y.dtype.element_ty), mask=mask)
