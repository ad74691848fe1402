"""What code decides about a value without calling anything of it, read from its bytecode.

``except RuntimeError`` and ``case Tensor()`` ask a value nothing, so that no proxy notices. Where
code does so is found in its instructions, once for each piece of code.
"""

import dataclasses
import dis
import functools
import itertools
import re
import sys
from collections.abc import Iterator
from types import CodeType

_NO_OPERATION = frozenset(("CACHE", "NOP", "EXTENDED_ARG", "NOT_TAKEN"))
_HANDLES = frozenset(("CHECK_EXC_MATCH", "CHECK_EG_MATCH", "JUMP_IF_NOT_EXC_MATCH", "POP_EXCEPT"))
_PATTERNS = frozenset(("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE"))


@dataclasses.dataclass(frozen=True)
class Decisions:
    """What one piece of code decides about values.

    Attributes:
        classes: offsets of instructions that read ``__class__``.
        tried: ranges of offsets in which exceptions are caught.
        matches: whether it matches values against patterns of classes, mappings or sequences.
    """

    classes: frozenset[int]
    tried: tuple[tuple[int, int], ...]
    matches: bool

    @property
    def is_empty(self) -> bool:
        """Whether it decides nothing."""
        return not (self.classes or self.tried or self.matches)


_KNOWN: dict[int, tuple[CodeType, Decisions | None]] = {}


def decisions(code: CodeType) -> Decisions | None:
    """What ``code`` decides; None if nothing."""
    # By identity, since the hash of code takes long; what is here is kept alive.
    found = _KNOWN.get(id(code))
    if found is None:
        made = _read(code)
        found = _KNOWN[id(code)] = (code, None if made.is_empty else made)
    return found[1]


def _read(code: CodeType) -> Decisions:
    instructions = list(dis.get_instructions(code))
    return Decisions(
        frozenset(one.offset for one in instructions if one.argval == "__class__"),
        tuple(_tried(code, instructions)),
        any(one.opname in _PATTERNS for one in instructions),
    )


@dataclasses.dataclass(frozen=True)
class TypeQuestion:
    """One ``type(x)`` or ``x.__class__``.

    Attributes:
        offset: of the instruction that gives the class.
        line: of the code.
        of_self: whether it asks ``self``.
        for_attribute: whether only an attribute of the class is read, like its name.
    """

    offset: int
    line: int
    of_self: bool
    for_attribute: bool


_ASKED: dict[int, tuple[CodeType, tuple[TypeQuestion, ...]]] = {}


def type_questions(code: CodeType) -> tuple[TypeQuestion, ...]:
    """Where ``code`` asks for classes of values, without the code inside it."""
    found = _ASKED.get(id(code))
    if found is None:
        asks = not _ASKS.isdisjoint(code.co_names)
        found = _ASKED[id(code)] = (code, tuple(_type_questions(code)) if asks else ())
    return found[1]


_ASKS = frozenset(("type", "__class__"))
_CALLS = frozenset(("PRECALL", "CALL", "CALL_FUNCTION"))


def _type_questions(code: CodeType) -> Iterator[TypeQuestion]:
    instructions = instructions_of(code)
    lines = [(start, line) for start, _, line in code.co_lines() if line is not None]
    for index, one in enumerate(instructions):
        end = index
        if one.opname == "LOAD_GLOBAL" and one.argval == "type":
            end = _call_of_one(instructions, index) if _is_called(instructions, index) else None
        elif one.opname != "LOAD_ATTR" or one.argval != "__class__":
            continue
        if end is not None:
            offset = instructions[end].offset
            line = max((start, line) for start, line in lines if start <= offset)[1]
            asked, by = instructions[index - 1 : index + 1]
            if end != index:
                asked, by = instructions[index + 1 : index + 3]
            of_self = asked.argval == "self" and (by is one or by.opname in _CALLS)
            after = instructions[end + 1].opname
            yield TypeQuestion(offset, line, of_self, after in ("LOAD_ATTR", "LOAD_METHOD"))


def _call_of_one(instructions: list[dis.Instruction], loaded: int) -> int | None:
    """Where the global loaded at ``loaded`` is called with one argument; None for several."""
    num_arguments = 0
    for index in range(loaded + 1, len(instructions)):
        one = instructions[index]
        if one.opname in _CALLS and one.arg == num_arguments:
            return index + (one.opname == "PRECALL") if one.arg == 1 else None
        num_arguments += dis.stack_effect(one.opcode, one.arg, jump=False)
    return None


JUMPS = frozenset((*dis.hasjabs, *dis.hasjrel))
"""Numbers of the instructions that may go on elsewhere."""


def instructions_of(code: CodeType) -> list[dis.Instruction]:
    """The instructions of ``code`` that do something, those that are two in one as two."""
    return [
        single
        for one in dis.get_instructions(code)
        if one.opname not in _NO_OPERATION
        for single in _singles(one)
    ]


def _singles(one: dis.Instruction) -> Iterator[dis.Instruction]:
    """``LOAD_FAST`` and ``LOAD_FAST`` for ``LOAD_FAST_LOAD_FAST``, and the like."""
    names = _FUSED.findall(one.opname)
    if len(names) < 2:
        yield one
        return
    for name, value in zip(names, one.argval, strict=True):
        yield one._replace(opname=name, opcode=dis.opmap[name], argval=value)


_FUSED = re.compile(r"(?:LOAD|STORE)_FAST(?:_BORROW)?(?=_LOAD|_STORE|$)")


def start_of(instructions: list[dis.Instruction], end: int) -> int:
    """Where the expression begins whose value the instruction at ``end`` leaves on the stack."""
    depth = 0
    for index in range(end, -1, -1):
        one = instructions[index]
        depth += dis.stack_effect(one.opcode, one.arg, jump=False)
        if depth >= 1:
            return index
    return 0


def is_used_as_value(code: CodeType, name: str) -> bool:
    """Whether ``code`` does something else with the global ``name`` than to call it."""
    instructions = instructions_of(code)
    return any(
        one.opname == "LOAD_GLOBAL" and one.argval == name and not _is_called(instructions, index)
        for index, one in enumerate(instructions)
    ) or any(is_used_as_value(one, name) for one in code.co_consts if isinstance(one, CodeType))


@functools.cache
def global_names(code: CodeType) -> frozenset[str]:
    """Names that ``code``, or code inside it, looks up in the globals: no names of attributes."""
    names = {
        str(one.argval)
        for one in instructions_of(code)
        # In the body of a class it may be one of these, too.
        if "GLOBAL" in one.opname or one.opname in ("LOAD_NAME", "STORE_NAME", "DELETE_NAME")
    }
    return frozenset(names).union(
        *(global_names(one) for one in code.co_consts if isinstance(one, CodeType))
    )


@functools.lru_cache(4096)
def imported_names(code: CodeType) -> frozenset[str]:
    """The modules that code and the functions inside it import, as it names them."""
    found = {one.argval for one in instructions_of(code) if one.opname == "IMPORT_NAME"}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= imported_names(constant)
    return frozenset(found)


@functools.lru_cache(4096)
def names_in_strings(code: CodeType) -> frozenset[str]:
    """What strings of code and of the functions inside it could name."""
    found: set[str] = set()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= names_in_strings(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return frozenset(found)


def _is_called(instructions: list[dis.Instruction], loaded: int) -> bool:
    """Whether the global that the instruction at ``loaded`` loads is called."""
    if sys.version_info >= (3, 11):
        return "NULL" in instructions[loaded].argrepr
    above = 0
    for one in instructions[loaded + 1 :]:
        arg = one.arg or 0
        num_arguments = {
            "CALL_FUNCTION": arg,
            "CALL_FUNCTION_KW": arg + 1,
            "CALL_FUNCTION_EX": 1 + (arg & 1),
        }.get(one.opname)
        if num_arguments == above:
            return True
        above += dis.stack_effect(one.opcode, one.arg, jump=False)
        if above < 0:
            break
    return False


def _tried(code: CodeType, instructions: list[dis.Instruction]) -> Iterator[tuple[int, int]]:
    """Ranges whose exceptions are caught, and not only passed on after a cleanup."""
    for start, end, target in _protected(code, instructions):
        handler = itertools.dropwhile(lambda one: one.offset < target, instructions)  # noqa: B023
        for one in handler:
            if one.opname in ("WITH_EXCEPT_START", "RERAISE"):
                break
            if one.opname in _HANDLES:
                yield start, end
                break


def _protected(
    code: CodeType, instructions: list[dis.Instruction]
) -> Iterator[tuple[int, int, int]]:
    """Ranges of offsets, and where it goes on after an exception there."""
    entries = getattr(dis.Bytecode(code), "exception_entries", None)
    if entries is not None:
        yield from ((entry.start, entry.end, entry.target) for entry in entries)
        return
    # Before Python 3.11 blocks are made as the code runs.
    for one in instructions:
        if one.opname == "SETUP_FINALLY":
            yield one.offset, one.argval, one.argval
