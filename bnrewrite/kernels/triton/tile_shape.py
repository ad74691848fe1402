"""Which shape tiles have, so that accesses are wide and little of a tile is outside the tensor."""

import math
from typing import NamedTuple, TypeAlias

TILE = 2048
"""Values of a tile: 16 per thread, loaded by several wide accesses that are in flight together."""

WHOLE = 4096
"""Values of a tile of a channel that one program sums; twice as many where they are all of it, and
it reads nothing else. Faster than programs that wait for each other, as long as tiles are few."""

SMALL = 4
"""Tiles per multiprocessor up to which one program of a reduction is enough."""

FEW = 4
"""Tiles that one program sums faster than several that wait for each other."""

_FULL = 1024
"""Values that make a program of whole channels worth its launch."""

_LONG = 256
"""Positions of a contiguous image that a tile keeps together: long accesses to few places."""

_WIDEST = 16
"""Bytes of an access, at most."""

_PASS_ROW = 256
"""Bytes of neighboring channels that a tile of a pass keeps together in channels-last."""

_REDUCTION_ROW = 32
"""Neighboring channels that a tile of a reduction keeps together in channels-last: the fewer there
are, the fewer partial sums has the program that adds them, and the more programs do so."""

_WIDE_ROW = 64
"""The same of a reduction of several tensors that are large ..."""

_LARGE = 96
"""... which they are from so many tiles per multiprocessor on; or from ..."""

_LARGE_UNEVEN = 32
"""... so many on, where pieces of rows share sectors of memory at their ends."""

_SECTOR = 32
"""Bytes of memory that are read together."""

_FOLDED_ACCESS = 4
"""Bytes of an access up to which a reduction folds rows of fewer channels than a tile has columns,
if there are many. Where each access is one value, rows of any length are folded."""

_FOLDED_COLUMNS = 8192
"""Columns of all blocks of such a reduction, at most, so that these are not too many."""

_FULL_BLOCKS = 0.9
"""Share of the columns of all blocks from which on they are full enough."""

_NARROW = 8
"""Bytes of an access below which small images are taken in groups."""

_MOST_COLUMNS = 1024
"""Columns of a block of whole images; see :attr:`TileShape.GROUP`."""


class TileShape(NamedTuple):
    """A tile has BLOCK_C columns of BLOCK_S positions, SPAN in each of its images.

    Attributes:
        N: images; 1 if ``LAST``.
        S: positions of a column in an image.
        P: columns of a channel.
        BLOCK_C: columns of a tile.
        SPAN: positions of a column in an image of a tile.
        VEC: what the dimension along memory is given in multiples of.
        LAST: whether columns are next to each other in memory.
        GROUP: 0 if each column is a channel, or ``FOLD``. Otherwise the images are small, and
            contiguous: the positions of an image are ``P`` columns, those of ``GROUP`` channels are
            a block, and a column has a position for each image.
        FOLD: whether ``P`` rows of channels-last are taken for one, because they start evenly only
            together: a column is a channel of every ``P``-th position.
        images: images of a tile.
        is_whole: whether a tile, or a few, are all of a channel.
    """

    N: int
    S: int
    P: int
    BLOCK_C: int
    SPAN: int
    VEC: int
    LAST: bool
    GROUP: int = 0
    FOLD: bool = False
    images: int = 1
    is_whole: bool = False

    @property
    def BLOCK_S(self) -> int:  # noqa: N802
        """Positions of a tile."""
        return self.images * self.SPAN

    @property
    def has_parts(self) -> bool:
        """Whether columns are parts of channels."""
        return self.FOLD or self.GROUP > 0


def tile_shape(
    N: int,
    C: int,
    S: int,
    itemsize: int,
    last: bool,
    reads: int,
    values: int,
    multiprocessors: int,
) -> TileShape:
    """The shape of tiles of ``values`` values; the other arguments are those of ``plan``."""
    widest = _WIDEST // itemsize
    if C == 1:
        N, S, last = 1, N * S, False
    if last:
        return _of_rows(N * S, C, itemsize, reads, values, multiprocessors)
    whole = _whole(N, C, S, reads, multiprocessors) if itemsize <= 4 else None
    if whole:
        span, images = whole
        block_c = min(max(_FULL // (span * images), 1), power_of_two(C))
        vec = math.gcd(S, widest)
        return TileShape(N, S, 1, block_c, span, vec, False, images=images, is_whole=True)
    is_narrow = math.gcd(S, widest) * itemsize < _NARROW
    group = _best_group(C, S, widest) if is_narrow else 0
    if group:
        block_c = power_of_two(group * S)
        span = min(max(values // block_c, 1), power_of_two(N))
        return TileShape(1, N, S, block_c, span, math.gcd(C * S, group * S, widest), True, group)
    span = _best_block(S, values, max(_LONG, values // power_of_two(C)))
    block_c = min(values // span, power_of_two(C))
    return TileShape(N, S, 1, block_c, span, math.gcd(S, widest), False)


def _of_rows(
    S: int, C: int, itemsize: int, reads: int, values: int, multiprocessors: int
) -> TileShape:
    """The same of channels-last, S rows of C channels."""
    is_narrow = C <= _REDUCTION_ROW
    is_uneven = not is_narrow and C * itemsize % _SECTOR > 0
    tiles_each = S * C // (values * multiprocessors)
    if reads == 0:
        row = _PASS_ROW // itemsize
    elif reads > 1 and tiles_each >= (_LARGE_UNEVEN if is_uneven else _LARGE):
        row = _WIDE_ROW
    else:
        row = _REDUCTION_ROW
    access = math.gcd(C * itemsize, _WIDEST)
    if access == _WIDEST:
        P = 1
    elif reads == 0:
        # As many as a block has columns: then every block is full.
        P = math.gcd(S, row)
    elif S * min(power_of_two(C), row) <= FEW * values:
        # One program has all of a channel, and no partial sums to add.
        P = 1
    elif access == itemsize or (access <= _FOLDED_ACCESS and is_narrow and tiles_each > SMALL):
        P = _rows_together(S, C, row, access)
    else:
        P = 1
    block_c = min(power_of_two(C * P), row)
    span = min(values // block_c, power_of_two(S // P))
    vec = math.gcd(C * P, _WIDEST // itemsize)
    return TileShape(1, S // P, P, block_c, span, vec, True, FOLD=P > 1)


def _rows_together(S: int, C: int, row: int, access: int) -> int:
    """Rows that a reduction folds into one: a divisor of S."""
    P = math.gcd(S, _WIDEST // access)
    while P > 1 and C * P > _FOLDED_COLUMNS:
        P //= 2

    def fullness(P: int) -> float:
        return C * P / row / -(-C * P // row)

    while 1 < P < row and S % (2 * P) == 0 and fullness(P) < _FULL_BLOCKS:
        P *= 2
    return P


_Whole: TypeAlias = tuple[int, int]
"""Positions and images of a tile of one channel."""


def _whole(N: int, C: int, S: int, reads: int, multiprocessors: int) -> _Whole | None:
    """None where programs are to share channels."""
    if reads == 0:
        return None
    padded = power_of_two(N) * power_of_two(S)
    longest = padded if reads == 1 and padded <= 2 * WHOLE else WHOLE
    span = min(power_of_two(S), longest)
    images = min(power_of_two(N), longest // span)
    num_tiles = -(-N // images) * -(-S // span)
    is_small = C * num_tiles * images * span <= SMALL * WHOLE * multiprocessors
    return (span, images) if num_tiles <= FEW and is_small else None


def _best_block(S: int, longest: int, shortest: int) -> int:
    """The length of tiles that wastes least of an image of S positions; the longest of the best."""
    blocks = [min(longest, power_of_two(S))]
    while blocks[-1] > shortest:
        blocks.append(blocks[-1] // 2)
    return min(blocks, key=lambda block: -(-S // block) * block)


def _best_group(C: int, S: int, widest: int) -> int:
    """How many images of S positions start with a wide access and waste least; 0 if none do."""
    step = widest // math.gcd(S, widest)
    most = min(_MOST_COLUMNS // S, power_of_two(C))
    groups = [
        group
        for group in range(step, most + 1, step)
        if power_of_two(group) * power_of_two(group * S) <= 2 * TILE
    ]
    if not groups or C * S % widest:
        return 0
    return max(groups, key=lambda group: (group * S / power_of_two(group * S), -group))


def power_of_two(value: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(value - 1, 0).bit_length()
