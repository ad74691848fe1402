"""Copies of code that tell what the code compares by identity.

``x is None`` asks a value nothing, so that no proxy notices. A copy of the code asks something else
instead, which is given both operands, wherever these come from:

    x is y          (x, y) in watch
    x is not y      (x, y) not in watch

A copy has more instructions, so jumps, lines and ranges of exceptions are counted anew.
"""

import dataclasses
import dis
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

from bnrewrite.capture.bytecode import JUMPS

_NONE_JUMPS = frozenset(
    number
    for name, number in dis.opmap.items()
    if name.startswith("POP_JUMP_") and name.endswith("_NONE")
)


class Watch:
    """Compares by identity; ``tell`` is told the operands that are not the same."""

    def __init__(self, tell: Callable[[Any, Any], None]) -> None:
        self._tell = tell
        self._copies: dict[int, tuple[CodeType, CodeType]] = {}
        self._originals: dict[int, CodeType] = {}

    def __contains__(self, pair: tuple[Any, Any]) -> bool:
        left, right = pair
        if left is not right:
            self._tell(left, right)
        return left is right

    def copy(self, code: CodeType) -> CodeType:
        """A copy of ``code`` that has this object compare; the code itself if it compares nothing.

        The same holds of the code inside it.
        """
        # By identity, since the hash of code takes long; what is here is kept alive.
        found = self._copies.get(id(code))
        if found is None:
            found = self._copies[id(code)] = (code, self._made(code))
            self._copies[id(found[1])] = (found[1], found[1])
            self._originals[id(found[1])] = code
        return found[1]

    def original(self, code: CodeType) -> CodeType:
        """What ``code`` is a copy of, or itself."""
        return self._originals.get(id(code), code)

    def _made(self, code: CodeType) -> CodeType:
        consts = tuple(
            self.copy(one) if isinstance(one, CodeType) else one for one in code.co_consts
        )
        pieces = list(_pieces(code))
        watched = [new for piece in pieces for new in _watched(piece, len(consts))]
        if len(watched) > len(pieces):
            return _assembled(code, watched, (*consts, None, self))
        return code if consts == code.co_consts else code.replace(co_consts=consts)


@dataclasses.dataclass
class _Piece:
    """One instruction.

    Attributes:
        opcode: its number.
        arg: its argument; that of a jump is counted anew.
        caches: code units that belong to it and follow.
        start: where the instruction began that it is or stands for.
        target: where it jumped to.
    """

    opcode: int
    arg: int = 0
    caches: int = 0
    start: int | None = None
    target: int | None = None

    def code(self) -> bytes:
        """Its code, with the upper bytes of a long argument in front."""
        found = bytearray()
        for shift in (24, 16, 8):
            if self.arg >> shift:
                found += bytes((dis.EXTENDED_ARG, self.arg >> shift & 0xFF))
        return bytes(found) + bytes((self.opcode, self.arg & 0xFF)) + bytes(2 * self.caches)


def _pieces(code: CodeType) -> Iterator[_Piece]:
    instructions = list(dis.get_instructions(code))
    ends = [one.offset for one in instructions[1:]] + [len(code.co_code)]
    start = None
    for one, end in zip(instructions, ends, strict=True):
        start = one.offset if start is None else start
        if one.opcode != dis.EXTENDED_ARG:
            target = one.argval if one.opcode in JUMPS else None
            yield _Piece(one.opcode, one.arg or 0, (end - one.offset) // 2 - 1, start, target)
            start = None


def _op(name: str, arg: int = 0) -> _Piece:
    return _Piece(dis.opmap[name], arg)


_CONTAINS = next(
    piece
    for piece in _pieces(compile("a in b", "", "eval"))
    if piece.opcode == _op("CONTAINS_OP").opcode
)


def _watched(piece: _Piece, none: int) -> Iterable[_Piece]:
    """What stands for an instruction; of the constants ``none`` is None, and the next one asked."""
    asks = [
        _op("BUILD_TUPLE", 2),
        _op("LOAD_CONST", none + 1),
        dataclasses.replace(_CONTAINS, start=None),
    ]
    if piece.opcode == dis.opmap["IS_OP"]:
        asks[-1].arg = piece.arg
        new = asks
    elif piece.opcode in _NONE_JUMPS:
        # It stays as it is, so that only what it jumps on is asked about.
        jump = dataclasses.replace(piece, start=None)
        new = [_op("COPY", 1), _op("LOAD_CONST", none), *asks, _op("POP_TOP"), jump]
    else:
        return (piece,)
    new[0].start = piece.start
    return new


def _assembled(code: CodeType, pieces: list[_Piece], consts: tuple[Any, ...]) -> CodeType:
    """``code`` of other instructions and constants."""
    places = _laid_out(pieces, len(code.co_code))
    changes: dict[str, Any] = {
        "co_code": b"".join(piece.code() for piece in pieces),
        "co_consts": consts,
        "co_stacksize": code.co_stacksize + 3,
        "co_linetable": bytes(_lines(code, places)),
    }
    if sys.version_info >= (3, 11):
        changes["co_exceptiontable"] = bytes(_ranges(code, places))
    return code.replace(**changes)


def _laid_out(pieces: list[_Piece], end: int) -> dict[int, int]:
    """Counts the jumps, and returns where everything is that began somewhere else before."""
    while True:
        places: dict[int, int] = {}
        jumps: list[tuple[_Piece, int]] = []
        offset = 0
        for piece in pieces:
            if piece.start is not None:
                places[piece.start] = offset
            offset += len(piece.code())
            if piece.target is not None:
                jumps.append((piece, 0 if piece.opcode in dis.hasjabs else offset))
        places[end] = offset
        before = [piece.arg for piece, _ in jumps]
        for piece, base in jumps:
            piece.arg = abs(places[piece.target] - base) // 2  # pyright: ignore[reportArgumentType]
        # A longer argument moves what comes after it.
        if before == [piece.arg for piece, _ in jumps]:
            return places


def _lines(code: CodeType, places: dict[int, int]) -> Iterator[int]:
    """The table of lines, without columns."""
    last = code.co_firstlineno
    # A long instruction has entries in its midst, too.
    starts = [(places[start], line) for start, _, line in code.co_lines() if start in places]
    ends = [*(start for start, _ in starts[1:]), places[len(code.co_code)]]
    for (start, line), end in zip(starts, ends, strict=True):
        size = end - start
        if not size:
            continue
        delta, last = (0, last) if line is None else (line - last, line)
        if sys.version_info >= (3, 11):
            yield from _locations(size, None if line is None else delta)
            continue
        while abs(delta) > 127:
            step = 127 if delta > 0 else -127
            yield from (0, step & 0xFF)
            delta -= step
        while size:
            part = min(size, 254)
            yield from (part, 0x80 if line is None else delta & 0xFF)
            size, delta = size - part, 0


def _locations(size: int, delta: int | None) -> Iterator[int]:
    """Entries of the table of lines from Python 3.11 on; ``delta`` is None for no line."""
    while size:
        units = min(size // 2, 8)
        yield 0x80 | (15 if delta is None else 13) << 3 | units - 1
        if delta is not None:
            yield from _continued(_digits(delta << 1 if delta >= 0 else -delta << 1 | 1))
            delta = 0
        size -= 2 * units


def _ranges(code: CodeType, places: dict[int, int]) -> Iterator[int]:
    """The table of ranges in which exceptions are handled, from Python 3.11 on."""
    bytecode: Any = dis.Bytecode(code)
    for entry in bytecode.exception_entries:
        start, end, target = (places[one] for one in (entry.start, entry.end, entry.target))
        numbers = start // 2, (end - start) // 2, target // 2, entry.depth << 1 | entry.lasti
        first, *rest = (byte for one in numbers for byte in _continued(_digits(one)[::-1]))
        yield from (first | 0x80, *rest)


def _digits(value: int) -> list[int]:
    """Six bits each, the lowest first."""
    found = [value & 0x3F]
    while value := value >> 6:
        found.append(value & 0x3F)
    return found


def _continued(digits: list[int]) -> list[int]:
    """All but the last marked as such."""
    return [*(digit | 0x40 for digit in digits[:-1]), digits[-1]]
