"""Children whose graphs take the place of their calls: the same as tracing through them."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bnrewrite
from bnrewrite.capture import capture
from bnrewrite.capture.owner import is_owner, owner_state
from tests.cases import CASES, Case


def spelled(graph: fx.Graph) -> list[Any]:
    """Every node with its arguments and where it comes from; names stand for nothing."""
    number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            node.target,
            repr(fx.node.map_arg((node.args, node.kwargs), number.__getitem__)),
            node.meta.get("scope"),
            node.meta.get("site"),
            node.meta.get("sites"),
            node.stack_trace,
        )
        for node in graph.nodes
    ]


def captured(model: nn.Module) -> dict[str, Any]:
    """All graphs of a converted model, what they assume, and the report."""
    found: dict[str, Any] = {"": bnrewrite.report(model).to_dict()}
    for name, module in model.named_modules():
        state = owner_state(module) if is_owner(module) else None
        if state is None:
            continue
        for kind, one in (("train", state.train), ("eval", state.eval)):
            for index, form in enumerate(one.forms):
                # Searching for a parameter, fx reads who has children, which means nothing.
                assumptions = {**vars(form.assumptions), "lengths": None, "containers": None}
                found[f"{name} {kind} {index}"] = (
                    spelled(form.graph), assumptions, form.arguments, form.tensor_arguments,
                    form.sites,
                )  # fmt: skip
    return found


def traced(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """``model`` converted without putting graphs in place of calls."""
    with monkeypatch.context() as patch:
        patch.setattr(capture, "spliced", lambda *_: None)
        return bnrewrite.convert(model)


_TWO_NAMES = pytest.mark.xfail(
    reason="a trace knows a module by its first name, a graph by that with which it is called"
)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=_TWO_NAMES if case.name == "RegisteredTwice" else ())
        for case in CASES
    ],
)
def test_every_case_is_captured_the_same_way(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = case.model()
    expected = captured(traced(model, monkeypatch))
    assert captured(bnrewrite.convert(bnrewrite.revert(model))) == expected


def test_layers_with_two_names_share_in_a_trace_too(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "RegisteredTwice")
    plain: Any = case.model()
    x = torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(plain)(x)
    for model in (bnrewrite.convert(copy.deepcopy(plain)), traced(plain, monkeypatch)):
        assert len(bnrewrite.report(model).rounds) == 2
        torch.testing.assert_close(model(x), expected)


class Child(nn.Module):
    """A layer with a site, and one more parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.gain = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.gain + self.gain


class Nested(nn.Module):
    """Sequences in sequences, with sites and without, and a site with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(Child(), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
            nn.Sequential(),
            Child(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class Keyword(Child):
    """Is called with a keyword, and with an option."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class Asks(Child):
    """Asks what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if isinstance(x, Tensor) else x[0])


class Functional(Child):
    """Has no site but a function call, whose name counts."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, training=True)


class Flag(Child):
    """Reads its flag."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x


class Several(nn.Module):
    """Takes several values."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Child()

    def forward(self, *values: Tensor) -> Tensor:
        return self.child(values[0]) + values[-1]


class Result(NamedTuple):
    """Of a child."""

    value: Tensor
    more: Tensor


class Gives(Child):
    """Gives a container."""

    def forward(self, x: Tensor) -> Any:
        return Result(super().forward(x), x)


class Identity(Child):
    """Gives what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return x


class Twice(nn.Module):
    """Two children of the same input, each called in the way of ``call``."""

    def __init__(
        self, make: Callable[[], nn.Module], call: Callable[[Any, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.a = make()
        self.b = make()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.a, x) + self.call(self.b, x * 2)


def plainly(child: Any, x: Tensor) -> Tensor:
    """A call."""
    return child(x)


def by_keyword(child: Any, x: Tensor) -> Tensor:
    """A call by keyword."""
    return child(x=x, scale=2.0)


def with_option(child: Any, x: Tensor) -> Tensor:
    """A call with an optional argument."""
    return child(x, 3.0)


def again(child: Any, x: Tensor) -> Tensor:
    """Two calls."""
    return child(child(x)) - child(x)


def several(child: Any, x: Tensor) -> Tensor:
    """A call with two values."""
    return child(x, x + 1)


def taken_apart(child: Any, x: Tensor) -> Tensor:
    """A result in parts."""
    result = child(x)
    return result.value - result[1]


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], bool]] = {
    "plain": (Child, plainly, True),
    "nested": (Nested, plainly, True),
    "called again": (Child, again, True),
    "keyword": (Keyword, by_keyword, False),
    "option": (Keyword, with_option, False),
    "asks for a type": (Asks, plainly, False),
    "function": (Functional, plainly, False),
    "function called again": (Functional, again, False),
    "flag": (Flag, plainly, True),
    "several values": (Several, several, False),
    "container": (Gives, taken_apart, False),
    "its argument": (Identity, plainly, True),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_child_is_captured_the_same_way(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, way, expect_spliced = CALLS[call]
    torch.manual_seed(0)
    plain = Twice(make, way).double()
    expected = captured(traced(copy.deepcopy(plain), monkeypatch))
    results = []
    splice = capture.spliced
    monkeypatch.setattr(
        capture, "spliced", lambda *args: results.append(splice(*args)) or results[-1]
    )
    converted: Any = bnrewrite.convert(copy.deepcopy(plain))
    assert captured(converted) == expected
    assert "a" in converted._bnrewrite_owner.train.inlined
    assert (results[-1] is not None) is expect_spliced
    for training in (True, False):
        x = torch.randn(4, 4, 3, 3, dtype=torch.float64)
        torch.testing.assert_close(
            converted.train(training)(x), plain.train(training)(x), rtol=1e-10, atol=1e-12
        )
    for ours, theirs in zip(converted.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_module_with_two_paths_is_left_to_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain: Any = Twice(Child, plainly).double()
    plain.b.bn = plain.a.bn
    expected = captured(traced(copy.deepcopy(plain), monkeypatch))
    converted = bnrewrite.convert(copy.deepcopy(plain))
    assert captured(converted) == expected
    x = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(converted.a.bn.running_var, plain.a.bn.running_var)


def test_changes_of_what_a_child_has_read_take_effect() -> None:
    torch.manual_seed(0)
    plain: Any = Twice(Flag, plainly).double()
    converted: Any = bnrewrite.convert(copy.deepcopy(plain))
    x = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    for model in (plain, converted):
        model.a.eval()
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-10, atol=1e-12)
