"""A forward may ask whether a child gave something, where the code of the child says it does.

y = self.child(x)
if y is None: ...        captured while nothing below the child is exchanged that could matter
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnrewrite
from bnrewrite.capture.owner import is_owner

X = torch.linspace(-1, 3, 3 * 4 * 5 * 5).view(3, 4, 5, 5).sin()


class Net(nn.Module):
    """Asks its child, which is opaque, since it branches on data."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        found = self.child(y)
        return y * 3 if found is None else y + found


class Child(nn.Module):
    """What the forwards below use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = nn.Sequential(nn.Tanh())
        self.down: Any = None
        self.act: Any = None
        self.nothing = Nothing()
        self.many = nn.ModuleList([Nothing()])
        self.table = Table()


class Nothing(nn.Module):
    """None, for a batch that is odd."""

    def forward(self, x: Tensor) -> Tensor | None:
        return None if x.shape[0] % 2 else x


class Table(nn.Module):
    """A dictionary."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x} if x.shape[0] % 2 == 0 else {}


def _handed_on(self: Child, x: Tensor) -> Any:
    y = self.inner(x)
    return y


def _down(self: Child, x: Tensor) -> Any:
    y = x
    if self.down is not None:
        y = self.down(x)
    return y


def _act(self: Child, x: Tensor) -> Any:
    y = x
    if self.act is not None:
        y = self.act(x)
    return y


def _conditional(self: Child, x: Tensor) -> Any:
    return None if x.shape[0] % 2 else x


def _stored(self: Child, x: Tensor) -> Any:
    y = x if x.shape[0] % 2 == 0 else None
    return y


def _either(self: Child, x: Tensor) -> Any:
    y = x * 2 if x.shape[0] % 2 == 0 else x
    return y


def _chosen(self: Child, x: Tensor) -> Any:
    return self.many[0](x)


def _looked_up(self: Child, x: Tensor) -> Any:
    return self.table(x).get("x")


def _subscripted(self: Child, x: Tensor) -> Any:
    return {"x": x if x.shape[0] % 2 == 0 else None}["x"]


def _skipping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Child, x: Tensor) -> Any:
        return None if x.shape[0] % 2 else function(self, x)

    return wrapper


_skipped = _skipping(_handed_on)


def _child(returns: Callable[..., Any]) -> Child:
    """A child of a class of its own."""
    cls: Any = type("Child", (Child,), {"forward": returns, "__module__": __name__})
    return cls()


def _assert_same(make: Callable[[], nn.Module], change: Callable[[Any], None] | None) -> Any:
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    model = bnrewrite.convert(make())
    for x in (X, X[:2]):
        torch.testing.assert_close(model(x), plain(x))
    if change is not None:
        for one in (plain, model):
            change(one)
        for x in (X, X[:2]):
            torch.testing.assert_close(model(x), plain(x))
    return model


def _exchange_inner(model: Any) -> None:
    model.child.inner[0] = Nothing()


def _append_inner(model: Any) -> None:
    model.child.inner.append(Nothing())


def _give_down(model: Any) -> None:
    model.child.down = Nothing()


def _give_act(model: Any) -> None:
    model.child.act = lambda x: None


@pytest.mark.parametrize(
    ("returns", "change"),
    [
        (_handed_on, _exchange_inner),
        (_handed_on, _append_inner),
        (_down, _give_down),
        (_act, _give_act),
        (_either, None),
    ],
    ids=["exchanged", "appended", "a child", "a function", "either"],
)
def test_what_is_exchanged_below_a_child(returns: Any, change: Any) -> None:
    model = _assert_same(lambda: Net(_child(returns)), change)
    assert is_owner(model), bnrewrite.report(model).skipped


def _none(*_: Any) -> None:
    return None


def _on_instance(module: Any, _: Any) -> None:
    module.forward = _none


def _on_class(module: Any, patch: Any) -> None:
    cls = type(module)._bnrewrite_original if hasattr(module, "_bnrewrite_owner") else type(module)
    patch.setattr(cls, "forward", _none, raising=False)


_Handing: Any = type(_child(_handed_on))

CHILDREN: dict[str, Callable[[], Any]] = {
    "its class's": lambda: _child(_handed_on),
    "inherited": lambda: type("Heir", (_Handing,), {})(),
    "layer": nn.Tanh,
    "sequence": lambda: nn.Sequential(nn.Tanh()),
    "owner": lambda: type("Row", (nn.Sequential,), {})(nn.BatchNorm2d(4), nn.ReLU()),
}


@pytest.mark.parametrize("replace", [_on_instance, _on_class])
@pytest.mark.parametrize("what", CHILDREN)
def test_a_forward_that_is_replaced(what: str, replace: Callable[..., None]) -> None:
    results = []
    for convert in (lambda model: model, bnrewrite.convert):
        torch.manual_seed(0)
        model: Any = convert(Net(CHILDREN[what]()))
        assert convert is not bnrewrite.convert or is_owner(model)
        results.append([model(X)])
        with pytest.MonkeyPatch.context() as patch:
            replace(model.child, patch)
            results[-1].append(model(X))
    torch.testing.assert_close(results[1], results[0])


class Asks(Net):
    """Asks for the type of what its child gives."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.child(self.bn(self.conv(x)))
        return found * 3 if isinstance(found, Tensor) else found[0]


class Listed(nn.Module):
    """A list with what it is given."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


def _hook(layer: Any) -> None:
    (layer[-1] if isinstance(layer, nn.Sequential) else layer).register_forward_hook(
        lambda _, args, result: [result]
    )


def _replace_forward(layer: Any) -> None:
    layer.forward = lambda x: [x]


def _append(layer: Any) -> None:
    layer.append(Listed())


@pytest.mark.parametrize(
    ("layers", "change"),
    [
        ([], _hook),
        ([nn.Sigmoid()], _hook),
        ([], _replace_forward),
        ([nn.Sigmoid()], _replace_forward),
        ([nn.Sigmoid()], _append),
    ],
)
def test_what_exchanges_what_a_layer_gives(layers: list[nn.Module], change: Any) -> None:
    def make() -> nn.Module:
        return Asks(nn.Sequential(*layers, nn.Tanh()) if layers else nn.Tanh())

    model = _assert_same(make, lambda one: change(one.child))
    assert is_owner(model)


@pytest.mark.parametrize(
    "returns",
    [_conditional, _stored, _chosen, _looked_up, _subscripted, _skipped],
    ids=lambda one: one.__name__,
)
def test_code_that_may_return_none(returns: Any) -> None:
    model = _assert_same(lambda: Net(_child(returns)), None)
    assert not is_owner(model)
    assert "with None" in bnrewrite.report(model).skipped[0].reason
