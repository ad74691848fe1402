"""Forwards that read configurations: objects of packages whose own code no trace can follow."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnrewrite
from tests.parity import assert_same_training


class Configuration:
    """Finds attributes by code that has a lock and a cache, as those of OmegaConf do."""

    _lock = threading.Lock()

    def __init__(self, **content: Any) -> None:
        object.__setattr__(self, "_content", content)
        object.__setattr__(self, "_cache", {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "interpolated":
            with self._lock:
                return self["scale"]
        self._cache[name] = len(self._cache)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self._content[name] = value

    def __getitem__(self, name: str) -> Any:
        if name not in self._content:
            raise AttributeError(name)
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configuration) and other._content == self._content

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"Configuration({self._content})"

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dictionary."""
        return self._content.get(name, default)


Configuration.__module__ = "omegaconf.stand_in"


class WithProperty(Configuration):
    """A subclass of a user's."""

    @property
    def half(self) -> float:
        """Half the scale."""
        return self.scale / 2


CONTENT = {"scale": 0.5, "activates": True}


def _omegaconf() -> Any:
    return pytest.importorskip("omegaconf").OmegaConf.create({**CONTENT, "more": CONTENT})


def _pydantic() -> Any:
    pydantic = pytest.importorskip("pydantic")
    fields = {"scale": (float, 0.5), "activates": (bool, True)}
    more = pydantic.create_model("More", **fields)
    return pydantic.create_model("Settings", **fields, more=(more, more()))()


def _transformers() -> Any:
    make = pytest.importorskip("transformers").PretrainedConfig
    return make(**CONTENT, more=make(**CONTENT))


KINDS: dict[str, Callable[[], Any]] = {
    "a stand-in": lambda: Configuration(**CONTENT, more=Configuration(**CONTENT)),
    "omegaconf": _omegaconf,
    "pydantic": _pydantic,
    "transformers": _transformers,
}


class Net(nn.Module):
    """Two branches, whose BatchNorms share a collective, and a configuration."""

    def __init__(self, config: Any, read: Callable[[Any], float]) -> None:
        super().__init__()
        self.config, self.read = config, read
        self.conv, self.b1, self.b2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b1(self.conv(x)) + self.b2(x) * self.read(self.config)
        return y.relu() if self.config.activates else y


def _attribute(config: Any) -> float:
    return config.scale


def _nested(config: Any) -> float:
    return config.more.scale if hasattr(config, "more") else 3.0


def _by_default(config: Any) -> float:
    return getattr(config, "scale", 2.0)


READS = [_attribute, _nested, _by_default]


def _shares(model: nn.Module) -> bool:
    return bnrewrite.report(model).collectives_forward == 1


def _inputs(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(n, 3, 4, 4),), {}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_attributes_count(kind: str, read: Callable[[Any], float]) -> None:
    plain = Net(KINDS[kind](), read)
    said = repr(plain.config)
    model: Any = bnrewrite.convert(copy.deepcopy(plain), mode="sync")
    assert _shares(model)
    assert repr(model.config) == said
    other = copy.deepcopy(model)
    assert _shares(other)
    for one in (plain, model):
        one.config.scale = 0.25
        one.config.more.scale = 0.125
    assert not _shares(model)
    assert _shares(other)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), plain(x))
    for one in (plain, model):
        one.config.activates = False
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_and_compiles(kind: str) -> None:
    assert_same_training(lambda: Net(KINDS[kind](), _attribute), _inputs)
    plain = Net(KINDS[kind](), _attribute)
    model: Any = bnrewrite.convert(copy.deepcopy(plain), mode="local")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(compiled(x), plain(x))
    plain.config.scale = model.config.scale = 0.25
    torch.testing.assert_close(compiled(x), plain(x))


def _set(config: Any) -> float:
    config.scale = 0.75
    return config.scale


DOES_MORE = "does more than read attributes of a configuration"

MORE: dict[str, Callable[[Any], float]] = {
    "an element": lambda config: config["scale"],
    "a method": lambda config: config.get("scale"),
    "an iterator": lambda config: float(len([*config])),
    "its text": lambda config: float(len(f"{config!r}")),
    "a comparison": lambda config: 2.0 if config == Configuration(scale=0.5) else 3.0,
    "a copy": lambda config: copy.copy(config).scale,
    "its dictionary": lambda config: vars(config)["_content"]["scale"],
    "a change": _set,
}


@pytest.mark.parametrize("what", MORE)
def test_a_forward_that_does_more_runs_as_it_is(what: str) -> None:
    plain = Net(KINDS["a stand-in"](), MORE[what])
    model: Any = bnrewrite.convert(copy.deepcopy(plain), mode="sync")
    assert not _shares(model)
    (left,) = bnrewrite.report(model).skipped
    assert f"{DOES_MORE}, a Configuration" in left.reason
    assert repr(model.config) == repr(plain.config)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), plain(x))


def test_the_class_is_as_it_was() -> None:
    before = dict(vars(Configuration))
    bnrewrite.convert(Net(KINDS["a stand-in"](), _attribute))
    assert dict(vars(Configuration)) == before


def test_the_code_of_a_users_subclass_is_read() -> None:
    model: Any = bnrewrite.convert(Net(WithProperty(**CONTENT), lambda config: config.half))
    assert _shares(model)
    model.config.scale = 0.25
    assert not _shares(model)
