"""What a forward reads besides modules may change at any time, and a graph must not hide it.

Flags and functions of a file, configurations, lists and dictionaries, closures, and what a forward
asks of torch: the graph stands for the forward only while they are as they were in its trace. And
the trace leaves them as they were.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import inspect
import itertools
import os
import pickle
import random
import types
import weakref
from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bnrewrite
from bnrewrite.capture.owner import is_owner
from tests.parity import CountEvaluations

FLAG = False
NAMESPACE = types.SimpleNamespace(scale=2.0)
TABLE = {"scale": 2.0}
COUNTS: list[int] = []


def double(x: Tensor) -> Tensor:
    """A function of this file."""
    return 2 * x


def scaled(x: Tensor, positional: list[float], *, keyword: float = 2.0) -> Tensor:
    """A function whose defaults may change."""
    return x * positional[0] * keyword


scaled.__defaults__ = ([2.0],)


class Kind(enum.Enum):
    """Plain values."""

    ONE = 1
    TWO = 2


@dataclasses.dataclass
class Config:
    """As models keep one."""

    scale: float = 2.0
    inner: Any = None
    unread: int = 0

    @property
    def flagged(self) -> float:
        return 3.0 if FLAG else 2.0


class Scale:
    """A function that is an object."""

    kind = 2.0

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale


class Flagged:
    """An object that a forward makes."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def value(self) -> Tensor:
        return self._value()

    def _value(self) -> Tensor:
        return -self.x if FLAG else self.x


@fx.wrap
def kept_whole(x: Tensor) -> Tensor:
    """A call of it is one node."""
    return x * 2 if x.numel() else x


element_of = {0: 2.0}.__getitem__


def wrapped(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function whose code is that of others, too."""

    @functools.wraps(function)
    def wrapper(x: Tensor) -> Tensor:
        return function(x)

    return wrapper


@wrapped
def halved(x: Tensor) -> Tensor:
    return x / 2


@wrapped
def negated(x: Tensor) -> Tensor:
    return -x if FLAG else x


def closure() -> tuple[Callable[[Tensor], Tensor], list[float]]:
    """A function, and what it closes over."""
    scales = [2.0]

    def scaled(x: Tensor) -> Tensor:
        return x * scales[0] * scaled.more  # pyright: ignore[reportFunctionMemberAccess]

    scaled.more = 1.0  # pyright: ignore[reportFunctionMemberAccess]
    return scaled, scales


class Block(nn.Module):
    """A convolution and a BatchNorm, and ``end``, which reads something besides."""

    end: Callable[["Block", Tensor], Any]
    number = 2.0
    numbers: tuple[float, ...] | list[float] = (2.0,)

    def __init__(self, end: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.child = nn.Identity()
        self.children_by_name = nn.ModuleDict({"a": nn.Tanh(), "b": nn.Sigmoid()})
        self.parameters_by_name = nn.ParameterDict({"a": nn.Parameter(torch.rand(1))})
        self.config: Any = Config(inner=Config())
        self.namespace = types.SimpleNamespace(scale=2.0)
        self.look_up = {"scale": 2.0}.get
        self.scaled = Scale(2.0).__call__
        self.scales: Any = [1.0, 2.0]
        self.pair = (1.0, 2.0)
        self.table = {"a": {"b": 2.0}}
        self.names: set[str] = set()
        self.array = np.ones(3)
        self.kind = Kind.ONE
        self.act: Any = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.scale = Scale(2.0)
        self.referred = weakref.ref(self.scale)
        self.memory = bytearray(b"\2")
        self.closure, self.closed = closure()
        self.calls = [0]
        self.queue = collections.deque([1], maxlen=3)
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return type(self).last(self.end(self, self.bn(self.conv(x))))

    @property
    def flagged(self) -> float:
        return 3.0 if FLAG else 2.0

    @staticmethod
    def last(x: Any) -> Any:
        """For those who want to replace it."""
        return x


class Two(nn.Module):
    """Two blocks that share a round, and so become part of one graph."""

    def __init__(self, end: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first = Block(end)
        self.second = Block(end)

    def forward(self, x: Tensor) -> tuple[Any, Any]:
        return self.first(x), self.second(x)


Change = Callable[[Any, pytest.MonkeyPatch], Any]

HERE = __name__


def _flagged(_: Any, x: Tensor) -> Tensor:
    return -x if FLAG else x


def _typed(block: Any, x: Tensor) -> Tensor:
    return x if type(block.child) is nn.Identity else -x


def _other_forward(self: Any, x: Tensor) -> Any:
    return self.bn(self.conv(x)) * 3


def _named_children(block: Any, x: Tensor) -> Tensor:
    for name, child in block.children_by_name.items():
        x = child(x) * len(name)
    return x


SETTINGS: Any = types.ModuleType("settings_of_a_user")
SETTINGS.mine, SETTINGS.helpers = 2.0, 3.0


def helped(x: Tensor) -> Tensor:
    """Reads what its caller names, too, but something else of it."""
    return x * SETTINGS.helpers * helped.scale  # pyright: ignore[reportFunctionMemberAccess]


helped.scale = 2.0  # pyright: ignore[reportFunctionMemberAccess]


def _tripled(x: Tensor) -> Tensor:
    return x * 3


READS: dict[str, tuple[Callable[[Any, Tensor], Any], Change]] = {
    "module that two functions name": (
        lambda _, x: helped(x) * SETTINGS.mine,
        lambda _, patch: patch.setattr(SETTINGS, "helpers", 4.0),
    ),
    "attribute of a function, read by itself": (
        lambda _, x: helped(x),
        lambda _, patch: patch.setattr(helped, "scale", 4.0),
    ),
    "code of a function": (
        lambda _, x: double(x),
        lambda _, patch: patch.setattr(double, "__code__", _tripled.__code__),
    ),
    "code of a forward": (
        lambda _, x: x,
        lambda _, patch: patch.setattr(Block.forward, "__code__", _other_forward.__code__),
    ),
    "attribute of an object": (
        lambda block, x: x * block.config.inner.scale,
        lambda block, _: setattr(block.config.inner, "scale", 3.0),
    ),
    "another object": (
        lambda block, x: x * block.config.scale,
        lambda block, _: setattr(block, "config", Config(3.0)),
    ),
    "attribute that an object lacks": (
        lambda block, x: x * getattr(block.config, "more", 1.0),
        lambda block, _: setattr(block.config, "more", 3.0),
    ),
    "namespace": (
        lambda block, x: x * block.namespace.scale,
        lambda block, _: setattr(block.namespace, "scale", 3.0),
    ),
    "element of a list": (
        lambda block, x: x * block.scales[1],
        lambda block, _: block.scales.__setitem__(1, 3.0),
    ),
    "another list": (
        lambda block, x: x * block.scales[1],
        lambda block, _: setattr(block, "scales", [1.0, 3.0]),
    ),
    "a tuple": (
        lambda block, x: x * block.pair[1],
        lambda block, _: setattr(block, "pair", (1.0, 3.0)),
    ),
    "dictionary in a dictionary": (
        lambda block, x: x * block.table["a"]["b"],
        lambda block, _: block.table["a"].__setitem__("b", 3.0),
    ),
    "a set": (
        lambda block, x: -x if "minus" in block.names else x,
        lambda block, _: block.names.add("minus"),
    ),
    "an array": (
        lambda block, x: x * float(block.array[0]),
        lambda block, _: block.array.__setitem__(0, 3.0),
    ),
    "an enumeration": (
        lambda block, x: x if block.kind is Kind.ONE else -x,
        lambda block, _: setattr(block, "kind", Kind.TWO),
    ),
    "a partial function": (
        lambda block, x: block.act(x),
        lambda block, _: setattr(block, "act", functools.partial(F.leaky_relu, negative_slope=3.0)),
    ),
    "an object that is called": (
        lambda block, x: block.scale(x),
        lambda block, _: setattr(block.scale, "scale", 3.0),
    ),
    "a closure": (
        lambda block, x: block.closure(x),
        lambda block, _: block.closed.__setitem__(0, 3.0),
    ),
    "attribute of a function": (
        lambda block, x: block.closure(x),
        lambda block, _: setattr(block.closure, "more", 3.0),
    ),
    "list of a class": (
        lambda block, x: x * block.numbers[0],
        lambda block, patch: patch.setattr(Block, "numbers", (3.0,)),
    ),
    "class by its name": (
        lambda _, x: x * Block.number,
        lambda block, patch: patch.setattr(Block, "number", 3.0),
    ),
    "method of a class": (
        lambda _, x: x,
        lambda block, patch: patch.setattr(Block, "last", staticmethod(torch.neg)),
    ),
    "forward of a class": (
        lambda _, x: x,
        lambda block, patch: patch.setattr(Block, "forward", lambda self, x: self.conv(x)),
    ),
    "flag of a file": (_flagged, lambda _, patch: patch.setattr(f"{HERE}.FLAG", True)),
    "flag that a property reads": (
        lambda block, x: x * block.flagged,
        lambda _, patch: patch.setattr(f"{HERE}.FLAG", True),
    ),
    "flag that a property of an object reads": (
        lambda block, x: x * block.config.flagged,
        lambda _, patch: patch.setattr(f"{HERE}.FLAG", True),
    ),
    "flag that an object reads which it makes": (
        lambda _, x: Flagged(x).value(),
        lambda _, patch: patch.setattr(f"{HERE}.FLAG", True),
    ),
    "flag that the second of two functions of the same code reads": (
        lambda _, x: negated(halved(x)),
        lambda _, patch: patch.setattr(f"{HERE}.FLAG", True),
    ),
    "attribute of the class of an object": (
        lambda block, x: x * type(block.scale).kind,
        lambda _, patch: patch.setattr(Scale, "kind", 3.0),
    ),
    "type of a child in a dictionary": (
        lambda block, x: x * sum(type(one) is nn.Tanh for one in block.children_by_name.values()),
        lambda block, _: block.children_by_name.update({"b": nn.Tanh()}),
    ),
    "name of the class of a child": (
        lambda block, x: x * len(block.child._get_name()),
        lambda block, _: setattr(block, "child", nn.Tanh()),
    ),
    "object that is referred to": (
        lambda block, x: x * block.referred().scale,
        lambda block, _: setattr(block.scale, "scale", 3.0),
    ),
    "memory": (
        lambda block, x: x * block.memory[0],
        lambda block, _: block.memory.__setitem__(0, 3),
    ),
    "variable by its name": (
        lambda _, x: -x if globals()["FLAG"] else x,
        lambda _, patch: patch.setattr(f"{HERE}.FLAG", True),
    ),
    "function of a file": (
        lambda _, x: double(x),
        lambda _, patch: patch.setattr(f"{HERE}.double", torch.neg),
    ),
    "default of a function": (
        lambda _, x: scaled(x),  # pyright: ignore[reportCallIssue]
        lambda _, patch: patch.setattr(scaled, "__defaults__", ([3.0],)),
    ),
    "default of a keyword": (
        lambda _, x: scaled(x, [2.0]),
        lambda _, patch: patch.setitem(scaled.__kwdefaults__ or {}, "keyword", 3.0),
    ),
    "variable of the environment": (
        lambda _, x: x * float(os.environ.get("TEST_READS", "2")),
        lambda _, patch: patch.setenv("TEST_READS", "3"),
    ),
    "namespace of a file": (
        lambda _, x: x * NAMESPACE.scale,
        lambda _, patch: patch.setattr(NAMESPACE, "scale", 3.0),
    ),
    "dictionary of a file": (
        lambda _, x: x * TABLE["scale"],
        lambda _, patch: patch.setitem(TABLE, "scale", 3.0),
    ),
    "type of a child": (_typed, lambda block, _: setattr(block, "child", nn.Tanh())),
    "instance of a class": (
        lambda block, x: x if isinstance(block.child, nn.Identity) else -x,
        lambda block, _: setattr(block, "child", nn.Tanh()),
    ),
    "names of children": (
        _named_children,
        lambda block, _: block.children_by_name.update({"cc": block.children_by_name.pop("a")}),
    ),
    "dictionary of parameters": (
        lambda block, x: x * sum(block.parameters_by_name.values()),
        lambda block, _: block.parameters_by_name.update(
            {"b": nn.Parameter(torch.rand(1, generator=torch.Generator().manual_seed(1)))}
        ),
    ),
    "function of Python's by its name": (
        lambda _, x: x * sqrt(2.0),
        lambda _, patch: patch.setattr(f"{HERE}.sqrt", abs),
    ),
    "function that fx leaves alone": (
        lambda _, x: kept_whole(x),
        lambda _, patch: patch.setattr(f"{HERE}.kept_whole", torch.neg),
    ),
    "a dictionary whose method it keeps": (
        lambda block, x: x * block.look_up("scale"),
        lambda block, _: block.look_up.__self__.update(scale=3.0),
    ),
    "a dictionary whose method a file keeps": (
        lambda _, x: x * element_of(0),
        lambda block, patch: patch.setitem(element_of.__self__, 0, 3.0),
    ),
    "an object whose method it keeps": (
        lambda block, x: block.scaled(x),
        lambda block, _: setattr(block.scaled.__self__, "scale", 4.0),
    ),
    "number of parameters": (
        lambda block, x: x * len([*block.parameters()]),
        lambda block, _: block.register_parameter("more", nn.Parameter(torch.rand(1))),
    ),
    "size of a convolution": (
        lambda block, x: F.conv2d(x, block.conv.weight, stride=block.conv.stride),
        lambda block, _: setattr(block.conv, "stride", (2, 2)),
    ),
    "the dictionary of a module": (
        lambda block, x: -x if "more" in vars(block) else x,
        lambda block, _: setattr(block, "more", 1),
    ),
    "whether gradients are recorded": (
        lambda _, x: x if torch.is_grad_enabled() else -x,
        lambda _, patch: torch.set_grad_enabled(False),
    ),
    "the default dtype": (
        lambda _, x: x if torch.get_default_dtype() == torch.float32 else -x,
        lambda _, patch: torch.set_default_dtype(torch.float64),
    ),
}


@contextlib.contextmanager
def _nothing_stays() -> Any:
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(True):
        try:
            yield patch
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("twice", [False, True], ids=["own graph", "inlined"])
@pytest.mark.parametrize("what", READS)
def test_a_change_of_what_a_forward_reads_takes_effect(what: str, twice: bool) -> None:
    end, change = READS[what]
    results = []
    for convert in (lambda model: model, bnrewrite.convert):
        with _nothing_stays() as patch:
            torch.manual_seed(0)
            model = convert(Two(end) if twice else Block(end))
            x = torch.randn(4, 4, 5, 5)
            results.append([model(x)])
            change(model.get_submodule("first") if twice else model, patch)
            results[-1].append(model(x))
    before, after = results[0]
    changed = (before[0], after[0]) if twice else (before, after)
    assert changed[0].shape != changed[1].shape or not torch.equal(*changed)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


class Heir(Block):
    """A class that inherits all that its forward uses."""


class Further(Heir):
    """One that asks the class above, which inherits it."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + 1


class Row(nn.Sequential):
    """A sequence by another name, whose forward is torch's."""

    def __init__(self, end: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())


class Larger(Scale):
    """A function that is an object, and inherits how it is called."""


LARGER = Larger(2.0)

INHERITED: dict[str, tuple[type, Any, Any, str]] = {
    "forward": (Heir, lambda _, x: x, Heir, "forward"),
    "forward of the class above": (Further, lambda _, x: x, Heir, "forward"),
    "forward of torch": (Row, None, Row, "forward"),
    "method of an object": (Block, lambda _, x: LARGER(x), Larger, "__call__"),
    "its class's own": (Block, lambda _, x: LARGER(x), Scale, "__call__"),
    "method of an object that it makes": (
        Block, lambda _, x: Larger(3.0)(x), Larger, "__call__",
    ),
    "number of a class": (Block, lambda _, x: x * Larger.kind, Larger, "kind"),
}  # fmt: skip


@pytest.mark.parametrize("twice", [False, True], ids=["own graph", "inlined"])
@pytest.mark.parametrize("what", INHERITED)
def test_a_class_that_no_more_inherits_takes_effect(what: str, twice: bool) -> None:
    cls, end, changed, name = INHERITED[what]
    new = -1.0 if name == "kind" else lambda _, x: -x
    results = []
    for convert in (lambda model: model, bnrewrite.convert):
        torch.manual_seed(0)
        two: Any = Two(lambda _, x: x)
        two.first, two.second = cls(end), cls(end)
        model = convert(two if twice else two.first)
        assert convert is not bnrewrite.convert or is_owner(model)
        x = torch.randn(4, 4, 5, 5)
        results.append([model(x)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(changed, name, new, raising=name != "forward")
            results[-1].append(model(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_a_number_that_a_class_inherits_and_a_forward_sets_stays() -> None:
    def count(block: Any, x: Tensor) -> Tensor:
        type(block).number += 1
        return x * block.number

    torch.manual_seed(0)
    model = bnrewrite.convert(Heir(count))
    assert "number" not in vars(Heir)
    assert "changes number" in bnrewrite.report(model).skipped[0].reason


class Signed(nn.Module):
    """Depends on a flag."""

    def forward(self, x: Tensor) -> Tensor:
        return -x if FLAG else x


class Direct(nn.Module):
    """Calls the forward of its child by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.child = nn.BatchNorm2d(4), Signed()

    def forward(self, x: Tensor) -> Tensor:
        return self.child.forward(self.bn(x))


CALLED: dict[str, Change] = {
    "a flag": lambda _, patch: patch.setattr(f"{HERE}.FLAG", True),
    "of the class": lambda _, patch: patch.setattr(Signed, "forward", lambda _, x: x * 3),
    "of the instance": lambda model, _: setattr(model.child, "forward", lambda x: x * 3),
}


@pytest.mark.parametrize("what", CALLED)
def test_a_forward_that_is_called_by_its_name_changes(what: str) -> None:
    results = []
    for convert in (lambda model: model, bnrewrite.convert):
        with _nothing_stays() as patch:
            model = convert(Direct())
            assert convert is not bnrewrite.convert or is_owner(model)
            x = torch.linspace(-1, 1, 400).view(4, 4, 5, 5)
            results.append([model(x)])
            CALLED[what](model, patch)
            results[-1].append(model(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def _runs_graph(model: Any) -> bool:
    values = model._bnrewrite_choose(True, (torch.randn(4, 4, 5, 5),), {})[1]
    return values is not None


def test_what_is_not_read_may_change() -> None:
    model: Any = bnrewrite.convert(
        Block(lambda block, x: x * block.config.inner.scale), strict=True
    )
    assert _runs_graph(model)
    model.config.unread = model.config.inner.unread = 1
    model.config.scale = 3.0
    model.table["a"] = {}
    assert _runs_graph(model)
    model.config.inner.scale = 3.0
    assert not _runs_graph(model)
    model.config.inner.scale = 2.0
    assert _runs_graph(model)


def test_a_parameter_that_is_read_may_change_its_dtype() -> None:
    model: Any = bnrewrite.convert(Block(lambda block, x: x * block.conv.weight.sum()), strict=True)
    model.bfloat16().requires_grad_(False)
    assert _runs_graph(model)
    model = Block(lambda block, x: x.to(next(block.parameters()).dtype) * 2)
    bnrewrite.convert(model, strict=True)
    assert _runs_graph(model)
    model.double()
    assert not _runs_graph(model)
    assert model(torch.randn(4, 4, 5, 5).double()).dtype == torch.float64


def test_copies_run_graphs_with_what_they_hold() -> None:
    def end(block: Any, x: Tensor) -> Tensor:
        scale = block.config.inner.scale * block.scales[0] * block.table["a"]["b"]
        return block.act(x) * scale * block.namespace.scale * float(block.array[0])

    model: Any = bnrewrite.convert(Block(end), strict=True)
    other = copy.deepcopy(model)
    assert other.config.inner is not model.config.inner
    assert _runs_graph(other)
    model.config.inner.scale = 3.0
    assert _runs_graph(other)
    assert not _runs_graph(model)
    x = torch.randn(4, 4, 5, 5)
    torch.testing.assert_close(model(x), 1.5 * other(x))


def _count_in_list(block: Any, x: Tensor) -> Tensor:
    block.calls[0] += 1
    return x * block.calls[0]


def _count_in_object(block: Any, x: Tensor) -> Tensor:
    block.config.unread += 1
    return x * block.config.unread


def _count_in_file(_: Any, x: Tensor) -> Tensor:
    COUNTS.append(1)
    return x * len(COUNTS)


def _count_in_flag(_: Any, x: Tensor) -> Tensor:
    global FLAG
    FLAG += 1
    return x * FLAG


def _count_in_class(_: Any, x: Tensor) -> Tensor:
    Block.number += 1
    return x * Block.number


def _queue(block: Any, x: Tensor) -> Tensor:
    block.queue.append(len(block.queue))
    return x * sum(block.queue)


CHANGES = {
    "a list": _count_in_list,
    "an object": _count_in_object,
    "a list of a file": _count_in_file,
    "a flag of a file": _count_in_flag,
    "a number of a class": _count_in_class,
    "a queue": _queue,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_forward_that_changes_what_it_keeps_is_not_captured(what: str) -> None:
    results = []
    for convert in (lambda model: model, bnrewrite.convert):
        with _nothing_stays() as patch:
            patch.setattr(f"{HERE}.COUNTS", [])
            patch.setattr(f"{HERE}.FLAG", False)
            patch.setattr(Block, "number", 1.0)
            torch.manual_seed(0)
            model = convert(Two(CHANGES[what]))
            x = torch.randn(4, 4, 5, 5)
            results.append([model(x) for _ in range(3)])
            if convert is bnrewrite.convert:
                assert not is_owner(model)
                reason = bnrewrite.report(model).skipped[0].reason
                assert "changes" in reason
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: random.Random(0), lambda: itertools.count(1)])
def test_a_forward_that_draws_from_an_object_is_not_captured(make: Callable[[], Any]) -> None:
    def end(block: Any, x: Tensor) -> Tensor:
        source = block.source
        return x * (source.random() if isinstance(source, random.Random) else next(source))

    results = []
    for convert in (lambda model: model, bnrewrite.convert):
        torch.manual_seed(0)
        model: Any = Block(end)
        model.source = make()
        convert(model)
        x = torch.randn(4, 4, 5, 5)
        results.append([model(x) for _ in range(2)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_a_forward_that_copies_an_object_is_not_captured(copied: Callable[[Any], Any]) -> None:
    def end(block: Any, x: Tensor) -> Tensor:
        return x * copied(block.namespace).scale

    plain: Any = Block(end)
    plain.namespace = argparse.Namespace(scale=2.0)
    model: Any = bnrewrite.convert(copy.deepcopy(plain))
    assert "copies an object that it keeps" in bnrewrite.report(model).skipped[0].reason
    plain.namespace.scale = model.namespace.scale = 3.0
    x = torch.randn(4, 4, 5, 5)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "read",
    [lambda config: inspect.getattr_static(config, "scale"), lambda config: _past_class(config)],
    ids=["inspect", "object"],
)
def test_a_forward_that_reads_without_asking_is_not_captured(read: Callable[[Any], Any]) -> None:
    model = bnrewrite.convert(Block(lambda block, x: x * read(block.config)))
    assert "past the class of an object" in bnrewrite.report(model).skipped[0].reason


def _past_class(config: Any) -> Any:
    return object.__getattribute__(config, "scale")


@pytest.mark.parametrize(
    "what", ["function of Python's by its name", "function that fx leaves alone"]
)
def test_graphs_with_functions_that_a_trace_records_run(what: str) -> None:
    model = bnrewrite.convert(Two(READS[what][0]))
    assert bnrewrite.report(model).skipped == ()
    with CountEvaluations() as counts:
        model(torch.randn(4, 4, 5, 5))
    assert (counts.num_ours, counts.num_torch) == (2, 0)


class Strict(type):
    """Forbids changes of its classes."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(f"{cls.__name__} is closed")


class Closed(metaclass=Strict):
    """As some settings are."""

    def __init__(self) -> None:
        self.scale = 2.0


def test_an_object_that_cannot_tell_is_not_captured() -> None:
    plain: Any = Block(lambda block, x: x * block.closed.scale)
    plain.closed = Closed()
    model: Any = bnrewrite.convert(copy.deepcopy(plain))
    assert "whose class cannot change, a Closed" in bnrewrite.report(model).skipped[0].reason
    plain.closed.scale = model.closed.scale = 3.0
    x = torch.randn(4, 4, 5, 5)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


def test_mere_memory_is_not_captured() -> None:
    model: Any = Block(lambda block, x: x * float(block.memory[0]))
    model.memory = memoryview(b"12")
    bnrewrite.convert(model)
    assert "reads a memoryview" in bnrewrite.report(model).skipped[0].reason


class Backbone(nn.Module):
    """A module with an attribute that is called as a variable of the script that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.model(x)).relu()


model: Any = None
"""Of a script; what it stands for changes as the model is made, converted and wrapped."""


def test_names_of_attributes_are_none_of_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Backbone()
    monkeypatch.setattr(f"{HERE}.model", made)
    monkeypatch.setattr(f"{HERE}.model", bnrewrite.convert(made))
    assert bnrewrite.report(made).skipped == ()
    monkeypatch.setattr(f"{HERE}.model", nn.Sequential(made))
    with CountEvaluations() as counts:
        model(torch.randn(4, 4, 5, 5))
    assert (counts.num_ours, counts.num_torch) == (1, 0)
    assert bnrewrite.report(made).skipped == ()


def test_large_tables_are_not_compared_at_every_call() -> None:
    model: Any = Block(lambda block, x: x * block.scales[-1])
    model.scales = [1.0] * 3000
    bnrewrite.convert(model)
    (skip,) = bnrewrite.report(model).skipped
    assert "reads a list with 3000 entries" in skip.reason
    with CountEvaluations() as counts:
        model(torch.randn(4, 4, 5, 5))
    assert (counts.num_ours, counts.num_torch) == (1, 0)


def test_classes_are_as_they_were() -> None:
    before = dict(vars(Config)), dict(vars(Scale)), dict(vars(Block))
    model = bnrewrite.convert(Block(lambda block, x: block.scale(x) * block.config.scale))
    assert is_owner(model)
    assert (dict(vars(Config)), dict(vars(Scale)), dict(vars(Block))) == before
    assert pickle.loads(pickle.dumps(Config())) == Config()


@pytest.mark.parametrize("what", ["flag of a file", "namespace of a file", "element of a list"])
def test_compiled_code_is_made_anew_when_it_changes(what: str) -> None:
    end, change = READS[what]
    with _nothing_stays() as patch:
        model = bnrewrite.convert(Block(end))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        x = torch.randn(4, 4, 5, 5)
        torch.testing.assert_close(compiled(x), model(x))
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compiled(x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        change(model, patch)
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()
