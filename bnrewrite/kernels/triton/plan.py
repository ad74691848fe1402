"""How a tensor is cut into tiles and programs. Nothing here depends on the device or its load."""

import dataclasses
import functools
import math

from torch import Tensor

_TILE = 2048
"""Values of a tile: 16 per thread, loaded by several wide accesses that are in flight together."""

_LONG = 256
"""Positions of a contiguous image that a tile keeps together: long accesses to few places."""

_REDUCTION_PROGRAMS = 1024
_PASS_PROGRAMS = 4096
"""Programs of a launch, as far as there are tiles: a multiple of what a device runs at a time."""

_FEW = 4
"""Tiles that one program sums faster than several that wait for each other."""

_MERGE = 2048
"""Partial sums that the last program loads at a time."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a launch.

    Attributes:
        N: images; 1 in channels-last.
        C: channels.
        S: positions of an image.
        BLOCK_C: channels of a tile.
        BLOCK_S: positions of a tile.
        VEC: what the dimension along memory is given in multiples of.
        LAST: whether channels are next to each other in memory.
        num_tiles: tiles of a channel block.
        num_warps: warps of a program.
    """

    N: int
    C: int
    S: int
    BLOCK_C: int
    BLOCK_S: int
    VEC: int
    LAST: bool
    num_tiles: int
    num_warps: int

    @property
    def num_blocks(self) -> int:
        """Channel blocks."""
        return -(-self.C // self.BLOCK_C)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, C and S as kernels take them."""
        if self.LAST:
            return self.N, self.C // self.VEC, self.S
        return self.N, self.C, self.S // self.VEC

    def num_splits(self, *, reduction: bool) -> int:
        """Programs that share the tiles of a channel block, evenly."""
        if reduction and self.num_tiles <= _FEW:
            return 1
        programs = _REDUCTION_PROGRAMS if reduction else _PASS_PROGRAMS
        each = -(-self.num_tiles * self.num_blocks // programs)
        return -(-self.num_tiles // each)

    @property
    def merge(self) -> int:
        """Splits whose partial sums are merged at a time."""
        return max(1, _MERGE // self.BLOCK_C)


def layout_of(x: Tensor) -> bool | None:
    """Whether channels are next to each other in ``x`` (N, C, *); None if it is not dense."""
    if x.is_contiguous():
        return x.numel() == x.size(0) * x.size(1)
    order = [0, *range(2, x.dim()), 1]
    return True if x.permute(order).is_contiguous() else None


def plan_of(x: Tensor) -> Plan | None:
    """The plan for ``x`` (N, C, *), not empty; None if the kernels cannot address it."""
    last = layout_of(x)
    if last is None:
        return None
    num_positions = x.numel() // (x.size(0) * x.size(1))
    return plan(x.size(0), x.size(1), num_positions, x.element_size(), last=last)


@functools.lru_cache(maxsize=4096)
def plan(N: int, C: int, S: int, itemsize: int, *, last: bool) -> Plan | None:
    """See :func:`plan_of`."""
    if last:
        N, S = 1, N * S
    values = _TILE if itemsize <= 4 else _TILE // 2
    if last:
        block_c = min(_power_of_two(C), 64 if itemsize >= 4 else 128)
        block_s = min(values // block_c, _power_of_two(S))
    else:
        block_s = _best_block(S, values)
        block_c = min(values // block_s, _power_of_two(C))
    vec = math.gcd(C if last else S, 16 // itemsize)
    num_tiles = N * -(-S // block_s)
    farthest = block_s * C if last else (block_c - 1) * S + block_s
    if farthest >= 1 << 31 or num_tiles >= 1 << 31 or C >= 1 << 31:
        return None
    return Plan(
        N=N,
        C=C,
        S=S,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        VEC=vec,
        LAST=last,
        num_tiles=num_tiles,
        # Single accesses take a mask and an address each: fewer of them per thread.
        num_warps=max(1, min(8 if vec == 1 else 4, block_c * block_s // 256)),
    )


def _best_block(S: int, values: int) -> int:
    """The length of tiles that wastes least of an image of S positions; the longest of the best."""
    longest = min(values, _power_of_two(S))
    blocks = [longest]
    while blocks[-1] > _LONG:
        blocks.append(blocks[-1] // 2)
    return min(blocks, key=lambda block: -(-S // block) * block)


def _power_of_two(value: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(value - 1, 0).bit_length()
