"""Forwards that ask for the class of a module, which conversion changes, do as before."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnrewrite
from bnrewrite.capture.asking import may_ask
from bnrewrite.capture.owner import is_owner


class Block(nn.Module):
    """An owner that takes an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, add: float = 0.0) -> Tensor:
        return self.bn(x) + add


KINDS = (Block, nn.Linear)


def _is_block(module: nn.Module) -> bool:
    return type(module) is Block


def _class_of(module: nn.Module) -> type:
    return type(module)


NAMES: dict[type, bool] = {Block: True}

ASKS: dict[str, Callable[[Any, nn.Module], bool]] = {
    "type is": lambda self, one: type(one) is Block,
    "type is not": lambda self, one: not (type(one) is not Block),
    "type equals": lambda self, one: type(one) == Block,  # noqa: E721
    "type in a tuple": lambda self, one: type(one) in (Block, nn.Linear),
    "type in a global": lambda self, one: type(one) in KINDS,
    "type in an attribute": lambda self, one: type(one) in self.kinds,
    "type in a dict": lambda self, one: NAMES.get(type(one), False),
    "__class__": lambda self, one: one.__class__ is Block,
    "a variable": lambda self, one: any(cls is Block for cls in [type(one)]),
    "a function": lambda self, one: _is_block(one),
    "a method": lambda self, one: self.is_block(one),
    "types of two": lambda self, one: type(one) is type(self.blocks[0]),
    "a function for the class": lambda self, one: _class_of(one) is Block,
}


class Parent(nn.Module):
    """Gives blocks another argument than other layers; it owns no site."""

    def __init__(self, asks: Callable[[Any, nn.Module], bool], *, branches: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), nn.ReLU()])
        self.kinds = [Block]
        self.asks, self.branches = asks, branches

    def is_block(self, module: nn.Module) -> bool:
        return type(module) == Block  # noqa: E721

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        for one in self.blocks:
            x = one(x, 1.0) if type(self).asks_(self, one) else one(x)
        if self.branches and x.sum() > 1e9:
            return x * 2
        return x if scale is None else x * scale


def _parent(asks: str, *, branches: bool = False) -> nn.Module:
    """A parent of a class of its own, whose code names what it asks."""
    name = {"asks_": ASKS[asks]}
    torch.manual_seed(0)
    return type("Parent", (Parent,), name)(ASKS[asks], branches=branches)


X = torch.randn(4, 3, 5, 5)


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("mode", ["sync", "local", "frozen"])
@pytest.mark.parametrize("asks", ASKS)
def test_the_class_from_before_decides(asks: str, mode: str) -> None:
    plain = _parent(asks)
    model = bnrewrite.convert(_parent(asks), mode, strict=True)
    assert is_owner(model)
    assert not bnrewrite.report(model).skipped
    for training in (False, True):
        plain.train(training and mode != "frozen")
        model.train(training)
        torch.testing.assert_close(model(X), plain(X))
    plain.eval()
    for same in (copy.deepcopy(model), bnrewrite.convert(model, mode)):
        torch.testing.assert_close(same.eval()(X), plain(X))
    assert not is_owner(bnrewrite.revert(model))


class Pickled(nn.Module):
    """Asks, at the top of its module, so that a pickle finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, 2.0) if type(self.block) is Block else self.block(x)


def test_a_pickle_answers_too() -> None:
    torch.manual_seed(0)
    model = bnrewrite.convert(Pickled().eval())
    expected = model(X)
    assert (expected - model.block(X)).mean() > 1
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(X), expected)


class Evaluates(Pickled):
    """Asks in evaluation only."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.block(x)
        return self.block(x, 2.0) if type(self.block) is Block else self.block(x)


class Whole(nn.Module):
    """Asks for the class of what becomes an owner only since it asks itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Pickled()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) * (3 if self.part.__class__ is Pickled else 1)


class Compares(nn.Module):
    """Asks for the class of a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) if type(self.bn) is nn.BatchNorm2d else x


@pytest.mark.parametrize("cls", [Evaluates, Whole, Compares])
@pytest.mark.parametrize("mode", ["sync", "local"])
def test_others_are_answered(cls: type[nn.Module], mode: str) -> None:
    torch.manual_seed(0)
    model = cls().eval()
    expected = model(X)
    bnrewrite.convert(model, mode, strict=True)
    torch.testing.assert_close(model(X), expected)
    assert is_owner(model)


@pytest.mark.parametrize("cls", [Pickled, Evaluates, Whole, Compares])
def test_a_compiler_sees_the_class_from_before(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = cls().eval()
    expected = model(X)
    bnrewrite.convert(model, "local")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), expected)


@pytest.mark.parametrize("mode", ["sync", "local"])
@pytest.mark.parametrize("asks", ASKS)
def test_a_forward_without_a_graph_is_named(asks: str, mode: str) -> None:
    """The trace ends after the question, so that it has seen any."""
    with pytest.warns(
        UserWarning, match=r"asks for the class of blocks.0 .*test_asking.py:\d+"
    ) as caught:
        model = bnrewrite.convert(_parent(asks, branches=True), mode)
    assert [one.filename for one in caught] == [__file__]
    skip = bnrewrite.report(model).skipped[-1]
    assert skip.name == "the model itself"
    assert "asks for the class of blocks.0, a Block" in skip.reason
    assert "test_asking.py" in str(skip.where)
    with pytest.raises(bnrewrite.CaptureError, match=r"asks for the class of blocks\.0"):
        bnrewrite.convert(bnrewrite.revert(model), mode, strict=True)


class First(Parent):
    """The trace ends before the question."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if x.sum() > 1e9:
            return x * 2
        for one in self.blocks:
            x = one(x, 1.0) if type(one) in KINDS else one(x)
        return x


class Values(Parent):
    """Uses ``type`` as a value."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.blocks[0](x, float(Block in map(type, self.blocks)))


@pytest.mark.parametrize("cls", [First, Values])
@pytest.mark.parametrize("mode", ["sync", "local"])
def test_code_tells_where_no_trace_can(cls: type[Parent], mode: str) -> None:
    with pytest.warns(UserWarning, match=r"asks for the class of blocks.0 .*test_asking.py:\d+"):
        model = bnrewrite.convert(cls(ASKS["type is"]), mode)
    assert "asks for the class" in bnrewrite.report(model).skipped[-1].reason


class Quiet(nn.Module):
    """Has no graph, and asks for nothing that conversion changes."""

    def __init__(self, asks: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.block, self.conv = Block(), nn.Conv2d(3, 3, 1)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        if self.asks(self, x) and x.sum() > 1e9:
            return x
        return self.block(self.conv(x))


QUIET: dict[str, Callable[[Any, Tensor], Any]] = {
    "itself": lambda self, x: type(self) is Quiet,
    "a tensor": lambda self, x: type(x) is Tensor,
    "a name": lambda self, x: type(self.block).__name__ == "Block",
    "the name of __class__": lambda self, x: self.block.__class__.__name__ == "Block",
    "what is not converted": lambda self, x: type(self.conv) is nn.Conv2d,
    "isinstance": lambda self, x: isinstance(self.block, Block),
    "a type": lambda self, x: isinstance(Block, type),
}


@pytest.mark.parametrize("mode", ["sync", "local"])
@pytest.mark.parametrize("asks", QUIET)
def test_no_false_alarms(asks: str, mode: str) -> None:
    model = bnrewrite.convert(Quiet(QUIET[asks]), mode)
    assert not is_owner(model)
    assert not bnrewrite.report(model).skipped
    model(X)


def test_calls_of_another_form_are_named() -> None:
    model = bnrewrite.convert(_parent("type is"))
    with pytest.warns(UserWarning, match=r"runs its own forward.* class of blocks\.0"):
        model(X, scale=torch.tensor(2.0))


def test_only_code_that_asks_is_searched_further() -> None:
    assert may_ask(_parent("a function"))
    assert not may_ask(Block())
    assert not may_ask(Quiet(QUIET["a name"]))
