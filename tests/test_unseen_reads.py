"""What forwards read past names and attributes of modules: graphs follow it, or are not made.

The reference is the unconverted module with the same changes.
"""

import copy
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnrewrite
from tests.models import Reading

Forward = Callable[[Any, Tensor], Tensor]


class Net(Reading):
    """One with an attribute of its class."""

    FACTOR = 1.0


def _x(num: int = 4) -> Tensor:
    return torch.randn(num, 3, generator=torch.Generator().manual_seed(num))


def _is_captured(model: nn.Module) -> bool:
    return "1 in captured graphs" in str(bnrewrite.report(model))


def _by_list(net: Any, y: Tensor) -> Tensor:
    for value in net.held.tolist():
        y = y * value
    return y


def _by_strides(net: Any, y: Tensor) -> Tensor:
    return y * net.held.stride(0) + net.held.storage_offset()


def _by_sign(net: Any, y: Tensor) -> Tensor:
    return y.abs().add(1) / net.held


def _by_type(net: Any, y: Tensor) -> Tensor:
    return y * (2 if isinstance(next(iter(net.held)), bool) else 3)


def _by_slice(net: Any, y: Tensor) -> Tensor:
    return y * (2 if isinstance(net.held.stop, bool) else 3)


@pytest.mark.parametrize(
    ("how", "one", "other"),
    [
        (_by_list, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])),
        (_by_strides, torch.zeros(4, 4)[1:], torch.zeros(3, 5)[:, 1:]),
        (_by_sign, 0.0, -0.0),
        (_by_type, {1}, {True}),
        (_by_type, frozenset((1,)), frozenset((True,))),
        (_by_slice, slice(0, 1), slice(False, True)),
    ],
    ids=["values", "strides", "sign of zero", "set", "frozenset", "slice"],
)
def test_what_a_module_holds_is_its_own(how: Forward, one: Any, other: Any) -> None:
    plain: Any = nn.Sequential(Net(how, one), Net(how, other))
    model: Any = bnrewrite.convert(copy.deepcopy(plain))
    for num in (4, 5):
        for net, reference in zip(model, plain, strict=True):
            torch.testing.assert_close(net(_x(num)), reference(_x(num)))
        for nets in (model, plain):
            nets[0].held, nets[1].held = other, one


@pytest.mark.parametrize("read", ["grad", "_version"])
def test_state_of_parameters_is_not_kept(read: str) -> None:
    def how(net: Any, y: Tensor) -> Tensor:
        values = [getattr(p, read) for p in net.parameters()]
        return y * (2 if values[0] else 3) if read == "_version" else y * (values[0] is None)

    model = bnrewrite.convert(Net(how))
    assert not _is_captured(model)
    assert f"reads {read} of its own tensors" in str(bnrewrite.report(model))
    assert torch.Tensor.grad is torch._C.TensorBase.grad  # pyright: ignore


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's, which is not imported by name here."""
    (tmp_path / "own_settings.py").write_text("SCALE = 1.0\nclass Config:\n    scale = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("own_settings")
    del sys.modules["own_settings"]


def _late(net: Any, y: Tensor) -> Tensor:
    from own_settings import SCALE  # pyright: ignore[reportMissingImports]

    return y * SCALE


def _late_class(net: Any, y: Tensor) -> Tensor:
    from own_settings import Config  # pyright: ignore[reportMissingImports]

    return y * Config.scale


def _late_module(net: Any, y: Tensor) -> Tensor:
    import own_settings as own  # pyright: ignore[reportMissingImports]

    return y * own.SCALE


def _held(net: Any, y: Tensor) -> Tensor:
    return y * net.held.SCALE


def _by_string(net: Any, y: Tensor) -> Tensor:
    return y * getattr(net.held, "SCALE") * getattr(net.held.Config, "scale")  # noqa: B009


def _handed_on(net: Any, y: Tensor) -> Tensor:
    return _scaled(y, net.held)


def _scaled(y: Tensor, own: Any) -> Tensor:
    return y * own.SCALE


@pytest.mark.parametrize(
    "how",
    [_late, _late_class, _late_module, _held, _by_string, _handed_on],
    ids=lambda how: how.__name__,
)
def test_modules_of_settings_are_read_anew(how: Forward, settings: Any) -> None:
    model, plain = bnrewrite.convert(Net(how, settings)), Net(how, settings)
    assert _is_captured(model)
    torch.testing.assert_close(model(_x()), plain(_x()))
    settings.SCALE = settings.Config.scale = 5.0
    torch.testing.assert_close(model(_x(5)), plain(_x(5)))


def _factor(net: Any, y: Tensor) -> Tensor:
    return y * net.FACTOR


def test_attributes_of_the_class_may_be_set_through_a_module() -> None:
    model, plain = bnrewrite.convert(Net(_factor)), Net(_factor)
    assert _is_captured(model)
    type(model).FACTOR = 5.0
    torch.testing.assert_close(model(_x()), 5 * plain(_x()))


def test_compiled_graphs_see_what_hides_an_attribute_of_the_class() -> None:
    model, plain = bnrewrite.convert(Net(_factor)), Net(_factor)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(_x()), plain(_x()))
    model.FACTOR = plain.FACTOR = 5.0
    torch.testing.assert_close(compiled(_x(5)), plain(_x(5)))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: np.random.default_rng().random(),
        lambda: random.Random().random(),
        lambda: random.SystemRandom().random(),
    ],
    ids=["numpy", "python", "system"],
)
def test_generators_of_its_own_are_refused(draw: Callable[[], float]) -> None:
    model = bnrewrite.convert(Net(lambda net, y: y * draw()))
    assert "draws random numbers outside the graph" in str(bnrewrite.report(model))
    assert not torch.equal(model(_x()), model(_x()))


def test_revert_leaves_nothing_of_a_graph_that_was_left() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.one(x) * scale + self.two(x)

    model = bnrewrite.convert(Two())
    model(_x(), scale=2.0)
    assert "_bnrewrite_left" in vars(model)
    assert not [name for name in vars(bnrewrite.revert(model)) if name.startswith("_bnrewrite")]


class Named(nn.Module):
    """Layers and tensors, of which some have two names."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.source, self.target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.now = self.source
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.layer = self.one
        self.shift: Tensor
        self.again: Tensor
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("again", self.shift)
        self.weight = nn.Parameter(torch.ones(3))
        self.same = self.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x) + self.now(x.sin())
        return self.layer(y) * self.weight + self.same * self.shift - self.again


def _untie_weight(net: Any) -> None:
    net.same = nn.Parameter(torch.full((3,), 2.0))


def _untie_buffer(net: Any) -> None:
    net.double()
    net.shift.fill_(3)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "now", net.target),
        lambda net: setattr(net, "layer", net.two),
        lambda net: setattr(net, "one", nn.Identity()),
        _untie_weight,
        _untie_buffer,
    ],
    ids=["BatchNorm", "layer", "the other name", "parameter", "buffer"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_two_names_may_stop_to_mean_one(change: Callable[[Any], None], compiled: bool) -> None:
    torch.manual_seed(0)
    plain = Named()
    model = bnrewrite.convert(copy.deepcopy(plain))
    assert "2 in captured graphs" in str(bnrewrite.report(model))
    run: Any = torch.compile(model, backend="aot_eager") if compiled else model
    torch.testing.assert_close(run(_x()), plain(_x()))
    for net in (model, plain):
        change(net)
    dtype = plain.bn.weight.dtype
    torch.testing.assert_close(run(_x(5).to(dtype)), plain(_x(5).to(dtype)))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_deleting_an_attribute_is_refused() -> None:
    def forget(net: Any, y: Tensor) -> Tensor:
        del net.held
        return y

    model = bnrewrite.convert(Net(forget, 1))
    assert "deletes an attribute" in str(bnrewrite.report(model))
    assert model.held == 1
