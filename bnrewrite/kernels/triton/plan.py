"""How a tensor is cut into tiles and programs."""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from bnrewrite.kernels.triton.tile_shape import (
    FEW,
    SMALL,
    TILE,
    WHOLE,
    TileShape,
    power_of_two,
    tile_shape,
)

_REDUCTION_PROGRAMS = 2
"""Programs of a reduction per multiprocessor: all run at a time, and each leaves partial sums."""

_MANY = 8
"""Tiles of 16-bit values per multiprocessor from which on larger ones are faster, where a reduction
reads nothing else; five times as many of 32 bits."""

_PASS_PROGRAMS = 4096
"""Programs of a pass that loads ahead, at most: a multiple of what a device runs at a time."""

_BUSY = 8
"""Programs of a pass per multiprocessor from which on each of them gets more than one tile ..."""

_AHEAD = 3
"""... up to this many, so that the next ones are loaded while one is used."""

_MERGE = 2048
"""Partial sums that the last program loads at a time, if it has four warps."""

_MERGED_CHANNELS = 256
"""Channels that these may be of; those of more would need too many registers."""

_STAGES = 3
"""See :attr:`Plan.STAGES`; of a program with several tiles. One more pays in reductions of 16 bits,
if they have large tiles, or read several contiguous tensors, whose images waste parts of tiles."""

_DEEP_STAGES = 6
"""The same of the moments of many 16-bit values in channels-last, where one program loads as far
ahead as two would, and leaves half as many partial sums."""

_MULTIPROCESSORS = 132
"""Where the device does not say how many it has."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How work is shared by programs.

    Attributes:
        C: channels.
        tile: the shape of tiles.
        num_blocks: blocks of columns.
        num_tiles: tiles of a block.
        num_splits: programs that share the tiles of a block, evenly.
        num_warps: warps of a program.
        STAGES: tiles of a program that are on their way or used: what comes next does not wait.
        is_tight: whether ptxas is known to spill, for some target and activation, where it has the
            choice. Wide values take registers, and so do single ones, each of which has an
            address and a mask, and blocks of groups, whose many columns have statistics each.
    """

    C: int
    tile: TileShape
    num_blocks: int
    num_tiles: int
    num_splits: int
    num_warps: int
    STAGES: int
    is_tight: bool

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, C, S and P as kernels take them."""
        tile = self.tile
        if tile.has_parts:
            return tile.N, self.C, tile.S, tile.P
        if tile.LAST:
            return tile.N, self.C // tile.VEC, tile.S, 1
        return tile.N, self.C, tile.S // tile.VEC, 1

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        """What of it kernels take for constants."""
        names = ("BLOCK_C", "BLOCK_S", "SPAN", "VEC", "LAST", "GROUP", "FOLD")
        return {**{name: getattr(self.tile, name) for name in names}, "STAGES": self.STAGES}

    @functools.cached_property
    def cut(self) -> tuple[int, ...]:
        """The values of these constants."""
        return tuple(self.constants.values())

    @functools.cached_property
    def of_sums(self) -> tuple[str, int, str, int]:
        """Names and values of constants of reductions only.

        MERGE: partial sums of a channel that are merged at a time; 0 if there is one. WIDE: the
        power of two that the channels of a group fit into; of folded rows, channels of which
        partial sums are merged at a time.
        """
        if self.tile.FOLD:
            most = min(power_of_two(self.C), _MERGED_CHANNELS)
            # The widest of the best, whose loads are next to each other.
            wide = min([most >> k for k in range(most.bit_length())], key=self._turns)
            merge = min(self._at_a_time(wide), power_of_two(self.num_partials))
            return "MERGE", merge, "WIDE", wide
        wide = power_of_two(self.tile.GROUP)
        merge = max(1, _MERGE // (wide if self.tile.GROUP else self.tile.BLOCK_C))
        return "MERGE", merge if self.num_splits > 1 else 0, "WIDE", wide

    def _at_a_time(self, wide: int) -> int:
        """Partial sums of each of ``wide`` channels that a program loads at a time."""
        return _MERGE * min(self.num_warps, 4) // 4 // wide

    def _turns(self, wide: int) -> int:
        """How often it loads until it has all of them, which it does one after another."""
        return -(-self.C // wide) * -(-self.num_partials // self._at_a_time(wide))

    @functools.cached_property
    def num_partials(self) -> int:
        """Partial sums of a channel; 0 if one program has all of it."""
        if self.tile.FOLD:
            return self.num_splits * self.tile.P
        return self.num_splits if self.num_splits > 1 else 0


NOTHING = Plan(0, TileShape(0, 0, 1, 1, 1, 1, True), 0, 0, 0, 4, 1, True)
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
    values = TILE * 4 // max(itemsize, 4)
    tiles_each = N * C * S // values // multiprocessors
    is_many = reads == 1 and tiles_each >= {2: _MANY, 4: 5 * _MANY}.get(itemsize, math.inf)
    values *= 1 + is_many
    tile = tile_shape(N, C, S, itemsize, last, reads, values, multiprocessors)
    num_blocks = -(-C // tile.GROUP) if tile.GROUP else -(-C * tile.P // tile.BLOCK_C)
    num_tiles = -(-tile.N // tile.images) * -(-tile.S // tile.SPAN)
    if tile.LAST:
        farthest = tile.BLOCK_S * C * tile.P
    else:
        farthest = ((tile.images - 1) * C + tile.BLOCK_C - 1) * S + tile.SPAN
    # What follows the last tile of a program, some steps ahead, has a number of 32 bits, too.
    if farthest >= 1 << 31 or num_tiles >= 1 << 30 or C * tile.P >= 1 << 31:
        return None
    is_wide = is_many and itemsize == 2
    is_deep = is_wide and tile.LAST and tile.VEC == 8 and not tile.GROUP
    if reads == 0 and tile.LAST and tile.VEC <= 2 and 4 <= tile.VEC * itemsize < 16:
        # Asynchronous copies, by which tiles are loaded ahead, are slow with so few values each.
        each = -(-num_tiles // 65535)
    elif reads == 0:
        total = num_tiles * num_blocks
        busy = -(-total // (multiprocessors * _BUSY))
        each = max(-(-total // _PASS_PROGRAMS), min(busy, _AHEAD))
    elif num_tiles <= FEW:
        each = num_tiles
    else:
        is_small = tiles_each <= SMALL and not tile.GROUP
        programs = 1 if is_small or is_deep else _REDUCTION_PROGRAMS
        # Rounded down: one more than run at a time makes a second round of them.
        each = -(-num_tiles // max(1, multiprocessors * programs // num_blocks))
    num_splits = -(-num_tiles // each)
    is_long = reads > 1 and itemsize == 2 and not tile.LAST
    if num_splits == num_tiles:
        stages = 1
    elif is_deep:
        stages = _DEEP_STAGES
    else:
        stages = _STAGES + (num_splits > 1 and (is_wide or is_long))
    # Registers: single accesses take a mask and an address each, unless a tile is all of a channel.
    needs_many = tile.BLOCK_S > WHOLE or reads > 1 if tile.is_whole else tile.VEC == 1
    return Plan(
        C,
        tile,
        num_blocks,
        num_tiles,
        num_splits,
        num_warps=max(1, min(8 if needs_many else 4, tile.BLOCK_C * tile.BLOCK_S // 256)),
        STAGES=stages,
        is_tight=itemsize == 8 or (tile.VEC == 1 and not tile.is_whole) or tile.GROUP > 0,
    )
