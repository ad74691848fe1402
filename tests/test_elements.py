"""What a forward asks about arguments and their elements; other calls run the original."""

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnrewrite
from bnrewrite.capture.owner import owner_state
from tests.models import perturb

X, Y = torch.linspace(-1, 3, 2 * 3 * 4 * 4).view(2, 3, 4, 4).sin().split(1)


class Block(nn.Module):
    """A layer behind one input or two, as decoders have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = x + 2 * skip
        return F.relu(self.bn(self.conv(x)))


class Decoder(nn.Module):
    """Two blocks that share a collective where both are part of one graph."""

    def __init__(self, find: Callable[..., tuple[Any, Any]]) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.find = find

    def forward(self, features: Any) -> Tensor:
        one, other = self.find(features)
        return self.first(one, other) + self.second(one)


def _by_position(features: Any) -> tuple[Any, Any]:
    features = features[1:][::-1]
    return features[0], features[1]


def _by_name(features: Any) -> tuple[Any, Any]:
    return features["one"], features["other"]


def _by_type(features: Any) -> tuple[Any, Any]:
    one = features[0]
    return one * 2 if isinstance(one, Tensor) else one["x"], features[1]


def _decoders(find: Callable[..., tuple[Any, Any]]) -> tuple[Decoder, Decoder]:
    plain, ours = Decoder(find), Decoder(find)
    perturb(plain)
    ours.load_state_dict(plain.state_dict())
    return plain, bnrewrite.convert(ours)


def _outcome(model: nn.Module, features: Any) -> list[Tensor]:
    model.zero_grad()
    y = model(features)
    y.square().sum().backward()
    return [y.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]


class Features(list):
    """A list of somebody's own."""


FEATURES: dict[str, tuple[Callable[..., tuple[Any, Any]], Any, bool]] = {
    "a list": (_by_position, [X, Y, X + Y], True),
    "a tuple": (_by_position, (X, Y, X + Y), True),
    "a tensor": (_by_type, torch.stack([X, Y]), True),
    "another length": (_by_position, [X, Y, X + Y, Y], True),
    "no skip": (_by_position, [X, None, X + Y], False),
    "a list of its own kind": (_by_position, Features([X, Y, X + Y]), False),
    "a dict": (_by_name, {"one": X, "other": Y}, True),
    "an ordered dict": (_by_name, OrderedDict(other=Y, one=X), True),
    "a dict without skip": (_by_name, {"one": X, "other": None}, False),
    "a dict with a default": (_by_name, defaultdict(lambda: None, one=X), False),
    "of the type": (_by_type, [X, Y], True),
    "of another type": (_by_type, [{"x": X}, Y], False),
}
"""What a decoder is given, and whether its graph is for that."""


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_graph_is_for_calls_with_tensors(kind: str, compiled: bool) -> None:
    find, features, is_for_it = FEATURES[kind]
    plain, ours = _decoders(find)
    state = owner_state(ours)
    assert state is not None
    assert state.train.shares
    assert (state.train.bind((features,), {}) is not None) is is_for_it
    if compiled:
        torch.compiler.reset()
        ours.compile(backend="aot_eager", fullgraph=kind != "a dict with a default")
    for one, other in zip(_outcome(ours, features), _outcome(plain, features), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("features", [[X], {"one": X}, X[0, 0, 0, 0], None, 3], ids=str)
def test_errors_are_those_of_the_forward(features: Any) -> None:
    for find in (_by_position, _by_name):
        plain, ours = _decoders(find)
        with pytest.raises(Exception) as expected:  # noqa: PT011
            plain(features)
        with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
            ours(features)


def _popped(features: Any) -> tuple[Any, Any]:
    return features.pop(0), features[0]


def _reversed(features: Any) -> tuple[Any, Any]:
    features = features[1:]
    features.reverse()
    return features[0], features[1]


def _nested(features: Any) -> tuple[Any, Any]:
    return features[0][0], features[0][1]


def _looked_up(features: Any) -> tuple[Any, Any]:
    return features.get("one"), features.get("other")


CHANGED: dict[str, tuple[Callable[..., tuple[Any, Any]], list[Any]]] = {
    "popped": (_popped, [lambda: [X, Y], lambda: [X, None]]),
    "reversed": (_reversed, [lambda: [X, Y, X], lambda: [X, None, Y]]),
    "nested": (_nested, [lambda: [[X, Y]], lambda: [[X, None]]]),
    "looked up": (_looked_up, [lambda: {"one": X, "other": Y}, lambda: {"one": X}]),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_what_may_have_changed_since_the_call_is_no_element(kind: str) -> None:
    find, makers = CHANGED[kind]
    plain, ours = _decoders(find)
    (decoder, *_) = bnrewrite.report(ours).owners
    assert "first" not in decoder.inlined
    for make in makers:
        for one, other in zip(_outcome(ours, make()), _outcome(plain, make()), strict=True):
            torch.testing.assert_close(one, other)


class AsksInOneMode(nn.Module):
    """Asks for the type, or for None, in one mode alone, and computes the same where it is not."""

    def __init__(self, asks: Callable[..., bool], training: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.asks = asks
        self.asks_in = training

    def forward(self, x: Any) -> Tensor:
        # Read in both modes, so that nothing else tells them apart.
        asks, mode, first, last = self.asks, self.asks_in, x[0], x[-1]
        if self.training is mode and asks(x, first, last):
            return self.bn(first) + 1
        return self.bn(last.expand(2, 3, 4, 4))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "asks",
    [
        lambda x, first, last: isinstance(x, list),
        lambda x, first, last: not isinstance(x, list),
        lambda x, first, last: first is None,
        lambda x, first, last: isinstance(last, tuple),
    ],
    ids=["type", "other types", "None", "type of an element"],
)
def test_a_mode_that_asks_has_a_graph_of_its_own(asks: Callable[..., bool], training: bool) -> None:
    plain = AsksInOneMode(asks, training)
    ours = bnrewrite.convert(AsksInOneMode(asks, training))
    for model in (plain, ours):
        model.train(training)
    for features in (X, [X, Y], (X, Y), [None, Y]):
        try:
            expected = plain(features)
        except (TypeError, ValueError, AttributeError) as error:
            with pytest.raises(type(error)):
                ours(features)
        else:
            torch.testing.assert_close(ours(features), expected)
