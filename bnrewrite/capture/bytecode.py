"""What code decides about a value without calling anything of it, read from its bytecode.

``x is None``, ``except RuntimeError`` and ``case Tensor()`` ask a value nothing, so that no proxy
notices. Where code does so is found in its instructions, once for each piece of code.
"""

import dataclasses
import dis
import itertools
from collections.abc import Iterator
from types import CodeType
from typing import Any

_NONE_JUMPS = frozenset(
    f"POP_JUMP_{way}IF_{what}"
    for way in ("", "FORWARD_", "BACKWARD_")
    for what in ("NONE", "NOT_NONE")
)
_NO_OPERATION = frozenset(("CACHE", "NOP", "EXTENDED_ARG", "PRECALL", "NOT_TAKEN"))
_HANDLES = frozenset(("CHECK_EXC_MATCH", "CHECK_EG_MATCH", "POP_EXCEPT"))
_PATTERNS = frozenset(("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE"))


@dataclasses.dataclass(frozen=True)
class Decisions:
    """What one piece of code decides about values.

    Attributes:
        none_names: variables that are compared with None by ``is``.
        names: variables that are compared by ``is`` with anything else.
        none_results: offsets of instructions whose result is compared with None at once.
        results: offsets of those whose result is compared by ``is`` with anything else.
        classes: offsets of those that read ``__class__``.
        tried: ranges of offsets in which exceptions are caught.
        matches: whether it matches values against patterns of classes, mappings or sequences.
    """

    none_names: frozenset[str]
    names: frozenset[str]
    none_results: frozenset[int]
    results: frozenset[int]
    classes: frozenset[int]
    tried: tuple[tuple[int, int], ...]
    matches: bool

    @property
    def is_empty(self) -> bool:
        """Whether it decides nothing."""
        return not (
            self.none_names or self.names or self.none_results or self.results or self.classes
            or self.tried or self.matches
        )  # fmt: skip


_KNOWN: dict[int, tuple[CodeType, Decisions | None]] = {}


def decisions(code: CodeType) -> Decisions | None:
    """What ``code`` decides; None if nothing."""
    # By identity, since the hash of code takes long; what is here is kept alive.
    found = _KNOWN.get(id(code))
    if found is None:
        made = _read(code)
        found = _KNOWN[id(code)] = (code, None if made.is_empty else made)
    return found[1]


def returns_none(code: CodeType | None) -> bool:
    """Whether code may say ``return None``, or return a variable that it sets to None.

    Of what it returns of others nothing is known; they rarely give None.
    """
    if code is None:
        return True
    instructions = [one for one in dis.get_instructions(code) if one.opname not in _NO_OPERATION]
    empty: set[Any] = set()
    returned: set[Any] = set()
    for before, one in itertools.pairwise(instructions):
        gives_none = before.opname == "LOAD_CONST" and before.argval is None
        if one.opname == "RETURN_CONST" and one.argval is None:
            return True
        if one.opname == "RETURN_VALUE" and gives_none:
            return True
        if one.opname.startswith("STORE_FAST") and gives_none:
            empty.add(one.argval)
        if one.opname == "RETURN_VALUE" and before.opname.startswith("LOAD_FAST"):
            returned.add(before.argval)
    return not empty.isdisjoint(returned)


def _read(code: CodeType) -> Decisions:
    all_instructions = list(dis.get_instructions(code))
    instructions = [one for one in all_instructions if one.opname not in _NO_OPERATION]
    none_names: set[str] = set()
    names: set[str] = set()
    none_results: set[int] = set()
    results: set[int] = set()
    for index, one in enumerate(instructions):
        before = instructions[max(index - 2, 0) : index]
        if not before:
            continue
        if one.opname in _NONE_JUMPS:
            _note(before[-1], none_names, none_results)
        elif one.opname == "IS_OP":
            with_none = before[-1].opname == "LOAD_CONST" and before[-1].argval is None
            if with_none:
                _note(before[0], none_names, none_results)
            else:
                for operand in before:
                    _note(operand, names, results)
    return Decisions(
        frozenset(none_names),
        frozenset(names),
        frozenset(none_results),
        frozenset(results),
        frozenset(one.offset for one in instructions if one.argval == "__class__"),
        tuple(_tried(code, all_instructions)),
        any(one.opname in _PATTERNS for one in instructions),
    )


def _note(operand: dis.Instruction, names: set[str], results: set[int]) -> None:
    """Notes what an instruction loads: a variable, or a result."""
    if "FAST" in operand.opname or "DEREF" in operand.opname:
        loaded = operand.argval if isinstance(operand.argval, tuple) else (operand.argval,)
        names.update(loaded)
    else:
        results.add(operand.offset)


def _tried(code: CodeType, instructions: list[dis.Instruction]) -> Iterator[tuple[int, int]]:
    """Ranges whose exceptions are caught, and not only passed on after a cleanup."""
    entries = getattr(dis.Bytecode(code), "exception_entries", None)
    if entries is None:
        # Before Python 3.11 blocks are made as the code runs.
        if any(one.opname == "JUMP_IF_NOT_EXC_MATCH" for one in instructions):
            yield 0, len(code.co_code)
        return
    for entry in entries:
        handler = itertools.dropwhile(lambda one: one.offset < entry.target, instructions)  # noqa: B023
        for one in handler:
            if one.opname in ("WITH_EXCEPT_START", "RERAISE"):
                break
            if one.opname in _HANDLES:
                yield entry.start, entry.end
                break
