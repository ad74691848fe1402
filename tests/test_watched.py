"""Copies of code that tell what it compares by identity do the same as the code."""

import argparse
import asyncio
import contextlib
import dis
import inspect
import types
from collections.abc import AsyncIterator, Callable, Iterator
from types import CodeType
from typing import Any

import pytest

from bnrewrite.capture import comparisons
from bnrewrite.capture.bytecode import JUMPS
from bnrewrite.capture.watched import Watch


def _two(x: Any) -> Any:
    return x is None, x is not None, x is x, x is ... is x


def _branches(x: Any, y: Any = None, *, z: Any = 3) -> Any:
    found = x if x is not None else y if y is not None else z
    return found, (x is None or y is None) and z is not None


def _loops(x: Any) -> Any:
    count = 0
    while x is not None:
        count += 1
        if count == 2:
            continue
        if count > 3:
            x = None
    return count, [one for one in (count, None) if one is not None]


def _generates(x: Any) -> Iterator[Any]:
    got = yield 1 if x is None else 2
    yield got is None
    yield from (one for one in (1, None, x) if one is not None)


def _tries(x: Any) -> Any:
    found = []
    with contextlib.suppress(KeyError):
        if x is None:
            raise KeyError
        found.append("not suppressed")
    try:
        if x is not None:
            raise ValueError(x)
    except ValueError as error:
        found.append(error.args is None)
    finally:
        found.append(x is None)
    return found


def _closes(x: Any) -> Any:
    count = 0

    class Inner:
        known = x is None

        def text(self) -> bool:
            return super().__repr__() is None or __class__ is not Inner

    def inner(y: Any) -> Any:
        nonlocal count
        count += y is x
        return count

    return inner(x), inner(Inner), Inner.known, Inner().text(), (lambda y: y is x)(x)


def _awaits(x: Any) -> Any:
    async def both() -> Any:
        async def numbers() -> AsyncIterator[Any]:
            for one in (1, x):
                yield one

        async with asyncio.Lock():
            await asyncio.sleep(0)
            return x is None, [one async for one in numbers() if one is not None]

    return asyncio.run(both())


def _matches(x: Any) -> Any:
    match x:
        case None:
            return 1
        case True:
            return 2
    return 3


def _long() -> Callable[..., Any]:
    """Jumps and constants of more than a byte."""
    lines = [f"        if x is {'not ' * (i % 2)}None: total += {i}.5" for i in range(400)]
    names: dict[str, Any] = {}
    exec(
        "\n".join(("def f(x):", "    total = 0", "    for _ in '12':", *lines, "    return total")),
        names,
    )
    return names["f"]


FUNCTIONS = [
    _two, _branches, _loops, _generates, _tries, _closes, _awaits, _matches, _long(),
]  # fmt: skip


def _made(function: Any, code: CodeType) -> Callable[..., Any]:
    made = types.FunctionType(code, function.__globals__, "f", function.__defaults__, None)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@pytest.mark.parametrize("x", [None, True, 5])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda one: one.__name__)
def test_a_copy_does_the_same(function: Any, x: Any) -> None:
    told: list[Any] = []
    new = _made(function, Watch(lambda *pair: told.append(pair)).copy(function.__code__))
    expected, found = function(x), new(x)
    if inspect.isgenerator(expected):
        expected, found = list(expected), list(found)
    assert found == expected
    if x is not None:
        assert (x, None) in told


def test_both_operands_are_told() -> None:
    told: list[Any] = []
    left, right = object(), object()
    new = _made(_is, Watch(lambda *pair: told.append(pair)).copy(_is.__code__))
    assert new([left], {"a": right}) is False
    assert new([left], {"a": left}) is True
    assert told == [(left, right)]


def _is(left: list[Any], right: dict[str, Any]) -> bool:
    return left[0] is right.get("a")


def test_code_that_compares_nothing_is_left_alone() -> None:
    watch = Watch(lambda *_: None)
    assert watch.copy(_made.__code__) is _made.__code__
    copied = watch.copy(_is.__code__)
    assert copied is not _is.__code__
    assert watch.copy(copied) is copied is watch.copy(_is.__code__)


class _Interrupted:
    """Stands for a function while Ctrl-C is pressed, as its code is given back."""

    code = interruptions = 0

    @property
    def __code__(self) -> Any:
        return self.code

    @__code__.setter
    def __code__(self, code: Any) -> None:
        if not self.interruptions:
            self.interruptions = 1
            raise KeyboardInterrupt
        self.code = code


def test_an_interruption_loses_no_code() -> None:
    function: Any = _Interrupted()
    with pytest.raises(KeyboardInterrupt), comparisons.giving_code_back():
        comparisons._CODES.append((function, 5))  # pyright: ignore
    with comparisons.giving_code_back():
        pass
    assert function.code == 5


_OURS = frozenset(("IS_OP", "BUILD_TUPLE", "LOAD_CONST", "CONTAINS_OP", "COPY", "POP_TOP"))
"""What stands for a comparison, or stood there."""


def _described(code: CodeType) -> tuple[Any, ...]:
    """Instructions, jumps and ranges of exceptions, by the lines where they are and lead to."""
    line_at = {at: line for start, end, line in code.co_lines() for at in range(start, end, 2)}
    instructions = [
        (one.opname, line_at[one.offset], line_at[one.argval] if one.opcode in JUMPS else one.arg)
        for one in dis.get_instructions(code)
        if one.opname not in ("EXTENDED_ARG", *_OURS)
    ]
    ranges = [
        (line_at[one.start], line_at[one.target], one.depth, one.lasti)
        for one in getattr(dis.Bytecode(code), "exception_entries", ())
    ]
    return instructions, ranges


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _codes(one)


@pytest.mark.parametrize(
    "module", [argparse, asyncio.base_events, inspect], ids=lambda m: m.__name__
)
def test_copies_of_pythons_library(module: types.ModuleType) -> None:
    code = compile(inspect.getsource(module), module.__name__, "exec")
    new = Watch(lambda *_: None).copy(code)
    assert new is not code
    for before, after in zip(_codes(code), _codes(new), strict=True):
        assert _described(after) == _described(before)
