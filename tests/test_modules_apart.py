"""Modules that a forward reads and does not contain: a teacher, a network above, a helper.

The reference is the unconverted module with the same changes.
"""

import copy
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnrewrite
from bnrewrite.capture.owner import is_owner, owner_state
from tests.models import Reading

Forward = Callable[[Any, Tensor], Tensor]


def _x(num: int = 4) -> Tensor:
    return torch.randn(num, 3, generator=torch.Generator().manual_seed(num))


def _is_captured(model: nn.Module) -> bool:
    return "1 in captured graphs" in str(bnrewrite.report(model))


class Other(nn.Module):
    """A module that no module holds as a child, like the teacher of a student."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0
        self.inner = nn.Dropout(0.25)

    @property
    def twice(self) -> float:
        return 2 * self.factor

    def scaled(self, y: Tensor) -> Tensor:
        return y * self.factor


OTHER = Other()


def _change_flag(other: Any) -> None:
    other.eval()


def _change_factor(other: Any) -> None:
    other.factor = 7.0


def _change_class_attribute(other: Any) -> None:
    other.gain = 5.0


def _change_inner(other: Any) -> None:
    other.inner.p = 0.75


def _take_inner(other: Any) -> None:
    other.inner = None


def _by_global(net: Any, y: Tensor) -> Tensor:
    return y * OTHER.factor


def _by_children(net: Any, y: Tensor) -> Tensor:
    for one in net.held[0].children():
        y = y * one.p
    return y


def _by_default(net: Any, y: Tensor) -> Tensor:
    return y * getattr(net.held[0], "missing", 3.0)


def _add_missing(other: Any) -> None:
    other.missing = 4.0


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("how", "change"),
    [
        (lambda net, y: y * net.held[0].factor, _change_factor),
        (lambda net, y: y if net.held[0].training else -y, _change_flag),
        (lambda net, y: y * net.held[0].gain, _change_class_attribute),
        (lambda net, y: y * net.held[0].inner.p, _change_inner),
        (lambda net, y: y if net.held[0].inner is None else -y, _take_inner),
        (lambda net, y: y * net.held[0].twice, _change_factor),
        (lambda net, y: net.held[0].scaled(y), _change_factor),
        (lambda net, y: net.held[1](y), _change_factor),
        (lambda net, y: y * next(iter(net.held[2])).factor, _change_factor),
        (_by_global, _change_factor),
        (_by_children, _change_inner),
        (_by_default, _add_missing),
    ],
    ids=[
        "attribute", "training", "attribute of the class", "child", "child that goes", "property",
        "method", "bound method", "in a set", "global", "children", "attribute that was missing",
    ],
)  # fmt: skip
def test_modules_that_are_no_children_are_read_anew(
    how: Forward, change: Callable[[Any], None], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Other()
    monkeypatch.setattr(sys.modules[__name__], "OTHER", other)
    plain = Reading(how, (other, other.scaled, {other}))
    model = bnrewrite.convert(Reading(how, plain.held))
    assert _is_captured(model)
    run = torch.compile(model, backend="eager") if compiled else model
    torch.testing.assert_close(run(_x()), plain(_x()))
    change(other)
    torch.testing.assert_close(run(_x(5)), plain(_x(5)))


def test_a_module_that_is_no_child_may_be_exchanged() -> None:
    plain = Reading(lambda net, y: y * net.held[0].factor, [Other()])
    model = bnrewrite.convert(copy.deepcopy(plain))
    torch.testing.assert_close(model(_x()), plain(_x()))
    for net in (plain, model):
        net.held[0] = Other()
        net.held[0].factor = -1.0
    torch.testing.assert_close(model(_x(5)), plain(_x(5)))


@pytest.mark.parametrize(
    "how",
    [
        lambda net, y: net.held[0](y),
        lambda net, y: y * net.held[0].__dict__["factor"],
        lambda net, y: y * vars(net.held[0])["factor"],
        lambda net, y: y * object.__getattribute__(net.held[0], "factor"),
        lambda net, y: y * net.held[1].dataset.how(net),
    ],
    ids=["call", "dictionary", "vars", "past the module", "in an object of a library"],
)
def test_what_cannot_be_followed_in_a_module_that_is_no_child(how: Forward) -> None:
    other = Other()
    other.forward = other.scaled
    unseen: Any = Reading(lambda net: other.factor)  # pyright: ignore
    plain = Reading(how, [other, torch.utils.data.Subset(unseen, [0])])
    model = bnrewrite.convert(Reading(how, plain.held))
    assert not _is_captured(model)
    other.factor = 9.0
    torch.testing.assert_close(model(_x()), plain(_x()))


def test_blocks_share_a_graph_though_modules_that_are_no_children_differ() -> None:
    def scaled(net: Any, y: Tensor) -> Tensor:
        return y * net.held[0].factor

    others = [Other(), Other()]
    others[1].factor = 11.0
    plain = nn.Sequential(*(Reading(scaled, [other]) for other in others))
    model = bnrewrite.convert(copy.deepcopy(plain))
    torch.testing.assert_close(model(_x()), plain(_x()))


@pytest.mark.parametrize(
    ("hold", "get"),
    [
        (lambda other: {other}, lambda held: next(iter(held))),
        (lambda other: frozenset((other,)), lambda held: next(iter(held))),
        (lambda other: {other: 1}, lambda held: next(iter(held))),
        (lambda other: {(other, 1): 1}, lambda held: next(iter(held))[0]),
        (lambda other: {1: other}.values(), lambda held: next(iter(held))),
        (lambda other: np.array([other], dtype=object), lambda held: held[0]),
        (lambda other: weakref.WeakSet((other,)), lambda held: next(iter(held))),
        (lambda other: weakref.WeakKeyDictionary({other: 1}), lambda held: next(iter(held))),
        (lambda other: [weakref.proxy(other)], lambda held: held[0]),
    ],
    ids=[
        "set",
        "frozenset",
        "key",
        "tuple in a key",
        "view",
        "array",
        "weak set",
        "weak key",
        "proxy",
    ],
)
def test_modules_are_found_in_whatever_holds_them(
    hold: Callable[[Any], Any], get: Callable[[Any], Any]
) -> None:
    other = Other()
    net: Any = bnrewrite.convert(Reading(lambda net, y: y * get(net.held).factor, hold(other)))
    before = net(_x())
    other.factor *= 4
    torch.testing.assert_close(net(_x()), 4 * before)


FACTOR = 1.0
"""What operators of modules read."""


class Operating(nn.ModuleList):
    """Operators that read a global."""

    def __getitem__(self, index: Any) -> Any:
        return FACTOR

    def __call__(self, y: Tensor) -> Tensor:
        return y * FACTOR

    def __bool__(self) -> bool:
        return FACTOR > 1


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        lambda one, y: y * one[0],
        lambda one, y: one(y),
        lambda one, y: y * (4.0 if one else 1.0),
    ],
    ids=["item", "call", "truth"],
)
def test_what_operators_of_modules_read(
    how: Callable[[Any, Tensor], Tensor], inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Operating()
    get: Any = (lambda net: net.held) if inside else (lambda net: net.held[0])
    net: Any = Reading(lambda net, y: how(get(net), y), one if inside else [one])
    model = bnrewrite.convert(net)
    before = model(_x())
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 4.0)
    torch.testing.assert_close(model(_x()), 4 * before)


class Layers(nn.Module):
    """Slices of its own lists, as code for graphs and feature pyramids has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(3))
        self.features = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears[:-1], self.norms, strict=True):
            x = norm(linear(x)).relu()
        features: Any = self.features
        for layer in features[:2]:
            x = layer(x)
        return (self.linears[-1:] + nn.ModuleList([features[2]]))[1](x)


def test_modules_made_on_the_way_are_no_others() -> None:
    torch.manual_seed(0)
    plain = Layers()
    model = bnrewrite.convert(copy.deepcopy(plain), strict=True)
    assert "3 in captured graphs" in str(bnrewrite.report(model))
    torch.testing.assert_close(model(_x()), plain(_x()))


RATES: dict[nn.Module, float] = {}


def _rate(net: Any, y: Tensor) -> Tensor:
    return y * RATES.get(net, 1.0)


def _rate_of_a_schedule(net: Any, y: Tensor) -> Tensor:
    return y * net.held[0].rates[net]


def _active(net: Any, y: Tensor) -> Tensor:
    return y * (2.0 if net.held[0].active is net else 3.0)


def _pair(net: Any, y: Tensor) -> Tensor:
    return y * (2.0 if net.held[1][0] is net.held[1][1] else 3.0)


@pytest.mark.parametrize("how", [_rate, _rate_of_a_schedule, _active, _pair])
def test_blocks_are_told_apart_by_what_they_are(
    how: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule: Any = Other()
    pairs = [(Other(), Other()), (one := Other(), one), (Other(), Other())]
    plain: Any = nn.Sequential(*(Reading(how, [schedule, pair]) for pair in pairs))
    schedule.rates = {block: 2.0 + index for index, block in enumerate(plain)}
    object.__setattr__(schedule, "active", plain[0])
    monkeypatch.setattr(sys.modules[__name__], "RATES", schedule.rates)
    expected = plain(_x())
    model: Any = bnrewrite.convert(plain)
    torch.testing.assert_close(model(_x()), expected)
    # Another one takes the place of the second half of a pair.
    pairs[1][1].factor = 1.0
    model[1].held[1] = (pairs[1][0], Other())
    object.__setattr__(schedule, "active", plain[2])
    schedule.rates[plain[0]] = 9.0
    ours = model(_x())
    torch.testing.assert_close(ours, bnrewrite.revert(model)(_x()))


@pytest.mark.parametrize("training", [True, False])
def test_a_block_may_read_the_mode_of_what_holds_it(training: bool) -> None:
    def scaled(net: Any, y: Tensor) -> Tensor:
        return y * (2.0 if net.held[0].training else 3.0)

    plain: Any = nn.Sequential(Reading(scaled), nn.ReLU(), Reading(scaled)).train(training)
    for block in (plain[0], plain[2]):
        block.held = [plain]
    model: Any = bnrewrite.convert(copy.deepcopy(plain))
    assert model.training is training
    for mode in (True, False):
        model.train(mode)
        plain.train(mode)
        torch.testing.assert_close(model(_x()), plain(_x()))
        for block in model.modules():
            state = owner_state(block) if is_owner(block) else None
            if state is not None:
                assert (state.train if mode else state.eval).holds(block)


def test_a_way_back_is_compared() -> None:
    other: Any = Other()
    object.__setattr__(other, "best", other)
    model: Any = bnrewrite.convert(Reading(lambda net, y: y * net.held[0].best.factor, [other]))
    before = model(_x())
    object.__setattr__(other, "best", Other())
    other.best.factor = 4 * other.factor
    torch.testing.assert_close(model(_x()), 4 * before)


def test_parameters_without_a_shape_are_read() -> None:
    def trains(net: Any, y: Tensor) -> Tensor:
        return y if all(one.requires_grad for one in net.held[0].parameters()) else -y

    lazy = nn.LazyLinear(3)
    plain = Reading(trains, [lazy])
    model = bnrewrite.convert(Reading(trains, [lazy]))
    torch.testing.assert_close(model(_x()), plain(_x()))


def test_other_threads_may_change_it_meanwhile() -> None:
    other: Any = Other()
    other.calls = count = 0
    stop = threading.Event()

    def run() -> None:
        nonlocal count
        while not stop.wait(1e-4):
            other.calls += 1
            count += 1

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(10):
        model = bnrewrite.convert(Reading(lambda net, y: y * net.held[0].factor, [other]))
        assert _is_captured(model)
    stop.set()
    thread.join()
    assert other.calls == count > 0
