"""How a tensor is cut into tiles and programs."""

import dataclasses
import functools
import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

_TILE = 2048
"""Values of a tile: 16 per thread, loaded by several wide accesses that are in flight together."""

_LONG = 256
"""Positions of a contiguous image that a tile keeps together: long accesses to few places."""

_PASS_ROW = 256
"""Bytes of neighbouring channels that a tile of a pass keeps together in channels-last."""

_REDUCTION_CHANNELS = 32
"""Neighbouring channels that a tile of a reduction keeps together in channels-last: the fewer there
are, the fewer partial sums has the program that adds them, and the more programs do so."""

_WIDE_ROW = 64
"""The same of a reduction of several tensors whose rows start at odd multiples of 8 bytes, if there
are more channels: pieces of rows then share sectors of memory at both of their ends."""

_NARROW = 8
"""Bytes of an access below which small images are taken in groups."""

_MOST_COLUMNS = 1024
"""Columns of a block of whole images; see :attr:`Plan.GROUP`."""

_REDUCTION_PROGRAMS = 2
"""Programs of a reduction per multiprocessor: all run at a time, and each leaves partial sums."""

_SMALL = 4
"""Tiles per multiprocessor up to which one program of a reduction is enough."""

_WHOLE = 4096
"""Values of a tile of a channel that one program sums; twice as many where they are all of it, and
it reads nothing else. Faster than programs that wait for each other, as long as tiles are few."""

_MANY = 8
"""Tiles of 16-bit values per multiprocessor from which on larger ones are faster, where a reduction
reads nothing else; five times as many of 32 bits."""

_PASS_PROGRAMS = 4096
"""Programs of a pass that loads ahead, at most: a multiple of what a device runs at a time."""

_BUSY = 8
"""Programs of a pass per multiprocessor from which on each of them gets more than one tile ..."""

_AHEAD = 3
"""... up to this many, so that the next ones are loaded while one is used."""

_FEW = 4
"""Tiles that one program sums faster than several that wait for each other."""

_MERGE = 2048
"""Partial sums that the last program loads at a time."""

_STAGES = 3
"""See :attr:`Plan.STAGES`; of a program with several tiles."""

_DEEP_STAGES = 6
"""The same of the moments of many 16-bit values in channels-last, where one program loads as far
ahead as two would, and leaves half as many partial sums."""

_FULL = 1024
"""Values that make a program of whole channels worth its launch."""

_MULTIPROCESSORS = 132
"""Where the device does not say how many it has."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Sizes of a launch. A tile has BLOCK_C columns of BLOCK_S positions.

    Attributes:
        N: images; 1 if ``LAST``.
        C: channels.
        S: positions of a column in an image.
        P: columns of a channel.
        BLOCK_C: columns of a tile.
        BLOCK_S: positions of a tile.
        SPAN: those of them that are in one image; the tile has ``BLOCK_S // SPAN`` images.
        VEC: what the dimension along memory is given in multiples of.
        LAST: whether columns are next to each other in memory.
        GROUP: 0 if each column is a channel. Otherwise the images are small, and contiguous: the
            positions of an image are ``P`` columns, those of ``GROUP`` channels are a block, and a
            column has a position for each image.
        num_blocks: blocks of columns.
        num_tiles: tiles of a block.
        num_splits: programs that share the tiles of a block, evenly.
        num_warps: warps of a program.
        STAGES: tiles of a program that are on their way or used: what comes next does not wait.
        is_tight: whether ptxas is known to spill, for some target and activation, where it has the
            choice. Wide values take registers, and so do single ones, each of which has an
            address and a mask, and columns that are parts of channels, which have statistics each.
    """

    N: int
    C: int
    S: int
    P: int
    BLOCK_C: int
    BLOCK_S: int
    SPAN: int
    VEC: int
    LAST: bool
    GROUP: int
    num_blocks: int
    num_tiles: int
    num_splits: int
    num_warps: int
    STAGES: int
    is_tight: bool

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, C, S and P as kernels take them."""
        if self.GROUP:
            return self.N, self.C, self.S, self.P
        if self.LAST:
            return self.N, self.C // self.VEC, self.S, 1
        return self.N, self.C, self.S // self.VEC, 1

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        """What of it kernels take for constants."""
        names = ("BLOCK_C", "BLOCK_S", "SPAN", "VEC", "LAST", "GROUP", "STAGES")
        return {name: getattr(self, name) for name in names}

    @functools.cached_property
    def cut(self) -> tuple[int, ...]:
        """The values of these constants."""
        return tuple(self.constants.values())

    @functools.cached_property
    def of_sums(self) -> tuple[str, int, str, int]:
        """Names and values of constants of reductions only.

        MERGE: splits whose partial sums are merged at a time; 0 if there is one split. WIDE: the
        power of two that GROUP channels fit into.
        """
        wide = _power_of_two(self.GROUP)
        merge = max(1, _MERGE // (wide if self.GROUP else self.BLOCK_C))
        return "MERGE", merge if self.num_splits > 1 else 0, "WIDE", wide


NOTHING = Plan(0, 0, 0, 1, 1, 1, 1, 1, True, 0, 0, 0, 0, 4, 1, True)
"""Of an empty tensor, but for the number of its channels."""


def layout_of(x: Tensor) -> bool | None:
    """Whether channels are next to each other in ``x`` (N, C, *); None if it is not dense."""
    if x.is_contiguous():
        return x.numel() == x.size(0) * x.size(1)
    order = [0, *range(2, x.dim()), 1]
    return True if x.permute(order).is_contiguous() else None


def plan_of(x: Tensor, *, reads: int = 0) -> Plan | None:
    """The plan for ``x`` (N, C, *); None if it is empty or the kernels cannot address it.

    Args:
        x: the input.
        reads: tensors that a reduction reads, 0 for a pass that writes what it reads.
    """
    return _plan_of(x.shape, x.stride(), x.element_size(), reads, x.get_device())


@functools.lru_cache(maxsize=4096)
def _plan_of(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    itemsize: int,
    reads: int,
    device: int,
) -> Plan | None:
    x = torch.empty_strided(shape, stride, device="meta")
    last = layout_of(x)
    if last is None or x.numel() == 0:
        return None
    N, C, *_ = shape
    return plan(N, C, x.numel() // (N * C), itemsize, last, reads, _multiprocessors(device))


def _multiprocessors(device: int) -> int:
    if device < 0:
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


_Whole: TypeAlias = tuple[int, int]
"""Positions and images of a tile of one channel."""


class _Tile(NamedTuple):
    """Attributes of a plan that say what a tile is, and how many images it has."""

    N: int
    S: int
    P: int
    BLOCK_C: int
    SPAN: int
    VEC: int
    LAST: bool
    GROUP: int
    images: int = 1


def _tile(
    N: int, C: int, S: int, itemsize: int, last: bool, values: int, row: int, whole: _Whole | None
) -> _Tile:
    """A tile of ``values`` values; in channels-last, of ``row`` neighbouring channels at most."""
    widest = 16 // itemsize
    if whole:
        span, images = whole
        block_c = min(max(_FULL // (span * images), 1), _power_of_two(C))
        return _Tile(N, S, 1, block_c, span, math.gcd(S, widest), False, 0, images)
    if last:
        block_c = min(_power_of_two(C), row)
        span = min(values // block_c, _power_of_two(N * S))
        return _Tile(1, N * S, 1, block_c, span, math.gcd(C, widest), True, 0)
    is_narrow = math.gcd(S, widest) * itemsize < _NARROW
    group = _best_group(C, S, widest) if is_narrow else 0
    if group:
        block_c = _power_of_two(group * S)
        span = min(max(values // block_c, 1), _power_of_two(N))
        return _Tile(1, N, S, block_c, span, math.gcd(C * S, group * S, widest), True, group)
    span = _best_block(S, values)
    block_c = min(values // span, _power_of_two(C))
    return _Tile(N, S, 1, block_c, span, math.gcd(S, widest), False, 0)


def plan(
    N: int,
    C: int,
    S: int,
    itemsize: int,
    last: bool,
    reads: int = 0,
    multiprocessors: int = _MULTIPROCESSORS,
) -> Plan | None:
    """See :func:`plan_of`."""
    values = _TILE * 4 // max(itemsize, 4)
    tiles_each = N * C * S // values // multiprocessors
    is_many = reads == 1 and tiles_each >= {2: _MANY, 4: 5 * _MANY}.get(itemsize, math.inf)
    whole = _whole(N, C, S, reads, multiprocessors) if itemsize <= 4 and not last else None
    row_access = math.gcd(C * itemsize, 16) if last else 16
    row = _REDUCTION_CHANNELS if reads else _PASS_ROW // itemsize
    if reads > 1 and row_access == 8 and C > _WIDE_ROW:
        row = _WIDE_ROW
    tile = _tile(N, C, S, itemsize, last, 2 * values if is_many else values, row, whole)
    block_s = tile.images * tile.SPAN
    num_blocks = -(-C // (tile.GROUP or tile.BLOCK_C))
    num_tiles = -(-tile.N // tile.images) * -(-tile.S // tile.SPAN)
    if tile.LAST:
        farthest = block_s * C * tile.P
    else:
        farthest = ((tile.images - 1) * C + tile.BLOCK_C - 1) * S + tile.SPAN
    # What follows the last tile of a program, some steps ahead, has a number of 32 bits, too.
    if farthest >= 1 << 31 or num_tiles >= 1 << 30 or C * tile.P >= 1 << 31:
        return None
    is_wide = is_many and itemsize == 2
    is_deep = is_wide and tile.LAST and tile.VEC == 8 and not tile.GROUP
    if reads == 0 and 4 <= row_access < 16 and tile.VEC <= 2:
        # Asynchronous copies, by which tiles are loaded ahead, are slow with so few values each.
        each = -(-num_tiles // 65535)
    elif reads == 0:
        total = num_tiles * num_blocks
        busy = -(-total // (multiprocessors * _BUSY))
        each = max(-(-total // _PASS_PROGRAMS), min(busy, _AHEAD))
    elif num_tiles <= _FEW:
        each = num_tiles
    else:
        is_small = tiles_each <= _SMALL and not tile.GROUP
        programs = 1 if is_small or is_deep else _REDUCTION_PROGRAMS
        # Rounded down: one more than run at a time makes a second round of them.
        each = -(-num_tiles // max(1, multiprocessors * programs // num_blocks))
    num_splits = -(-num_tiles // each)
    if num_splits == num_tiles:
        stages = 1
    else:
        stages = _DEEP_STAGES if is_deep else _STAGES + (is_wide and num_splits > 1)
    # Registers: single accesses take a mask and an address each, unless a tile is all of a channel.
    needs_many = block_s > _WHOLE or reads > 1 if whole else tile.VEC == 1
    return Plan(
        C=C,
        BLOCK_S=block_s,
        num_blocks=num_blocks,
        num_tiles=num_tiles,
        num_splits=num_splits,
        num_warps=max(1, min(8 if needs_many else 4, tile.BLOCK_C * block_s // 256)),
        STAGES=stages,
        is_tight=itemsize == 8 or (tile.VEC == 1 and not whole) or tile.GROUP > 0,
        N=tile.N,
        S=tile.S,
        P=tile.P,
        BLOCK_C=tile.BLOCK_C,
        SPAN=tile.SPAN,
        VEC=tile.VEC,
        LAST=tile.LAST,
        GROUP=tile.GROUP,
    )


def _whole(N: int, C: int, S: int, reads: int, multiprocessors: int) -> _Whole | None:
    """None where programs are to share channels."""
    if reads == 0:
        return None
    padded = _power_of_two(N) * _power_of_two(S)
    longest = padded if reads == 1 and padded <= 2 * _WHOLE else _WHOLE
    span = min(_power_of_two(S), longest)
    images = min(_power_of_two(N), longest // span)
    num_tiles = -(-N // images) * -(-S // span)
    is_small = C * num_tiles * images * span <= _SMALL * _WHOLE * multiprocessors
    return (span, images) if num_tiles <= _FEW and is_small else None


def _best_block(S: int, values: int) -> int:
    """The length of tiles that wastes least of an image of S positions; the longest of the best."""
    longest = min(values, _power_of_two(S))
    blocks = [longest]
    while blocks[-1] > _LONG:
        blocks.append(blocks[-1] // 2)
    return min(blocks, key=lambda block: -(-S // block) * block)


def _best_group(C: int, S: int, widest: int) -> int:
    """How many images of S positions start with a wide access and waste least; 0 if none do."""
    step = widest // math.gcd(S, widest)
    most = min(_MOST_COLUMNS // S, _power_of_two(C))
    groups = [
        group
        for group in range(step, most + 1, step)
        if _power_of_two(group) * _power_of_two(group * S) <= 2 * _TILE
    ]
    if not groups or C * S % widest:
        return 0
    return max(groups, key=lambda group: (group * S / _power_of_two(group * S), -group))


def _power_of_two(value: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(value - 1, 0).bit_length()
