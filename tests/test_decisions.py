"""Forwards that decide by what no proxy can show run as they are; others are captured."""

import argparse
import builtins
import collections
import contextlib
import contextvars
import dataclasses
import functools
import logging
import operator
import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import bnrewrite
from bnrewrite.capture.owner import is_owner
from tests.models import perturb

X = torch.linspace(-1, 3, 4 * 3 * 5 * 5).view(4, 3, 5, 5).sin()
CONTEXT = contextvars.ContextVar("CONTEXT", default=1.0)
LOCAL = threading.local()
LOCAL.value = 1.0
LOGGER = logging.getLogger(__name__)
RECORDS: list[Any] = []


class Net(nn.Module):
    """Two branches around what a case does to the first of them."""

    def __init__(self, do: Callable[..., Any]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.aux, self.even, self.scaled = Aux(), Even(), Scaled(4, 4, 1)
        self.odd = Odd()
        self.hands = HandsOn()
        self.w = nn.Parameter(torch.ones(4, 3, 1, 1))
        self.args = argparse.Namespace(scale=1.0)
        self.slots = Slots()
        self.users = collections.UserDict(scale=1.0)
        self.view = types.MappingProxyType(TABLE)
        self.do = functools.partial(do)

    def forward(self, x: Any, other: Any = None) -> Tensor:
        first = x if isinstance(x, Tensor) else x["x"] if isinstance(x, dict) else x.x
        y = self.bn1(self.conv1(first))
        y = self.do(self, y, x)
        return F.relu(y + self.bn2(self.conv2(first)))


class Aux(nn.Module):
    def forward(self, x: Tensor) -> Tensor | None:
        return x if self.training else None


class Odd(nn.Module):
    """Nothing on a batch of which it asks too much."""

    def forward(self, x: Tensor) -> Tensor | None:
        return None if x.shape[0] % 2 else x


class HandsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Aux()

    def forward(self, x: Tensor) -> Tensor | None:
        return self.inner(x)


class Even(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % 2:
            raise RuntimeError("an odd batch")
        return x


class Scaled(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x * 2)


class Slots:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


TABLE = {"scale": 1.0}
SCALES = {4: 1.0, 5: 10.0}


@dataclasses.dataclass
class Batch:
    """A batch with an optional member."""

    x: Tensor
    mask: Tensor | None = None


@functools.singledispatch
def prepare(x: Any) -> Any:
    return x


prepare.register(Tensor, lambda x: x**2)


def _in_autocast(self: Net, y: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.conv2(x.float()) + y


def _with_gradients(self: Net, y: Tensor, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return self.w.sum() * y


def _forked(self: Net, y: Tensor, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return y * torch.rand(1)


def _caught(self: Net, y: Tensor, x: Tensor) -> Tensor:
    try:
        return self.even(y)
    except RuntimeError:
        return y + 1


def _caught_bare(self: Net, y: Tensor, x: Tensor) -> Tensor:
    try:
        y = self.even(y)
    except:  # noqa: E722
        y = y + 1
    return y


def _matched(self: Net, y: Tensor, x: Any) -> Tensor:
    match x:
        case Tensor():
            return y * 2
        case _:
            return y


def _hooked(self: Net, y: Tensor, x: Tensor) -> Tensor:
    handle = self.conv2.register_forward_hook(lambda module, args, output: output * 2)  # pyright: ignore
    z = self.conv2(x)
    handle.remove()
    return y + z


def _generated(self: Net, y: Tensor, x: Tensor) -> Tensor:
    old = self.conv2._parameters["weight"]
    self.conv2._parameters["weight"] = torch.tanh(self.w)  # pyright: ignore
    y = y + self.conv2(x)
    self.conv2._parameters["weight"] = old
    return y


def _accumulated(self: Net, y: Tensor, x: Tensor) -> Tensor:
    total: Any = None
    for conv in (self.conv1, self.conv2):
        total = conv(x) if total is None else total + conv(x)
    return y + total


def _logged(self: Net, y: Tensor, x: Tensor) -> Tensor:
    LOGGER.warning("a step")
    return y


def _looked_up(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return y * SCALES.get(x.shape[-1], 0.0)  # pyright: ignore


def _member(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return y * (2.0 if x.shape[-1] in {4} else 1.0)


def _as_text(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return y * (2.0 if str(x.shape[-1]) == "5" else 1.0)


def _optional(self: Net, y: Tensor, x: Any) -> Tensor:
    mask = x.get("mask") if isinstance(x, dict) else x.mask
    return y if mask is None else y * mask


def _optional_at_once(self: Net, y: Tensor, x: Any) -> Tensor:
    return y * x.mask if x.mask is not None else y


def _gradient(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return y if self.w.grad is None else y * 3


def _childless(self: Net, y: Tensor, x: Tensor) -> Tensor:
    extra = self.aux(x)
    return y if extra is None else y + extra.mean()


def _same(self: Net, y: Tensor, x: Tensor) -> Tensor:
    other = self.aux(y) if self.training else x
    return y * 2 if other is y else y


def _exists(value: Any) -> bool:
    return value is not None


def _returned(self: Net, y: Tensor, x: Tensor) -> Tensor:
    extra = self.aux(y)
    if extra is None:
        return y * 2
    return extra


def _conditional(self: Net, y: Tensor, x: Tensor) -> Tensor:
    extra = self.aux(y)
    return y * 2 if extra is None else extra


def _walrus(self: Net, y: Tensor, x: Tensor) -> Tensor:
    if (extra := self.aux(y)) is not None:
        return extra
    return y * 2


def _filtered(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return sum([one for one in (y, self.aux(y)) if one is not None])  # pyright: ignore


def _generated_sum(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return y + sum(one for one in (y, self.aux(y)) if one is not None)


def _nested(self: Net, y: Tensor, x: Tensor) -> Tensor:
    def exists(value: Any) -> bool:
        return value is not None

    return y * 2 if exists(self.aux(x)) else y


def _first(*values: Any) -> Any:
    for value in values:
        if value is not None:
            return value
    return None


def _helper(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return _first(self.aux(y), y * 2)


def _call(self: Net, x: Tensor) -> Tensor | None:
    return self.aux(x)


def _called(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return y if _call(self, x) is None else y * 2


def _of_dtype(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return y * 2 if x.dtype is torch.float32 else y


def _suppressed(self: Net, y: Tensor, x: Tensor) -> Tensor:
    with contextlib.suppress(RuntimeError):
        y = self.even(y) * 2
    return y


def _handed_on(self: Net, y: Tensor, x: Tensor) -> Tensor:
    extra = self.hands(y)
    return y if extra is None else y + extra


class Result:
    """An object that a forward makes."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def is_empty(self) -> bool:
        return self.value is None

    def asks_another(self) -> bool:
        return self._is_empty()

    def _is_empty(self) -> bool:
        return self.value is None

    def __bool__(self) -> bool:
        return self.value is not None


def _made_result(value: Any) -> Result:
    return Result(value)


def _element(self: Net, y: Tensor, x: Tensor) -> Tensor:
    found = [self.odd(y)]
    return y if found[0] is None else y * 2


def _entry(self: Net, y: Tensor, x: Tensor) -> Tensor:
    found = {"odd": self.odd(y)}
    return y if found.get("odd") is None else y * 2


def _loop(self: Net, y: Tensor, x: Tensor) -> Tensor:
    total = y
    for scale, value in ((2, y), (3, self.odd(y))):
        if value is not None:
            total = total + scale * value
    return total


def _decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


@_decorated
def _doubled(value: Any) -> Any:
    return value * 2


@_decorated
def _is_there(value: Any) -> bool:
    return value is not None


COMPARED: dict[str, Callable[..., Any]] = {
    "an element": _element,
    "an entry": _entry,
    "in a loop": _loop,
    "a member": lambda self, y, x: y if Batch(y, self.odd(y)).mask is None else y * 2,
    "a namespace": lambda self, y, x: (
        y if types.SimpleNamespace(odd=self.odd(y)).odd is None else y * 2
    ),
    "a property": lambda self, y, x: y if Result(self.odd(y)).is_empty else y * 2,
    "a method of a method": lambda self, y, x: y if Result(self.odd(y)).asks_another() else y * 2,
    "an operator": lambda self, y, x: y * 2 if Result(self.odd(y)) else y,
    "an object of a function": lambda self, y, x: y * 2 if _made_result(self.odd(y)) else y,
    "filter": lambda self, y, x: sum(filter(lambda v: v is not None, (y, self.odd(y)))),
    "next": lambda self, y, x: next(v for v in (self.odd(y), y * 2) if v is not None),
    "a key": lambda self, y, x: min(self.odd(y), y * 2, key=lambda v: v is None) * 2,
    "reduce": lambda self, y, x: functools.reduce(
        lambda a, b: a if b is None else a + b, (y, self.odd(y))
    ),
    "one of two with the same code": lambda self, y, x: (
        _doubled(y) if _is_there(self.odd(y)) else y
    ),
    "operator.is_": lambda self, y, x: y if operator.is_(self.odd(y), None) else y * 2,
    "an alias of operator.is_": lambda self, y, x: y if IS(self.odd(y), None) else y * 2,
    "a partial operator.is_": lambda self, y, x: y if IS_NONE(self.odd(y)) else y * 2,
    "an alias of hasattr": lambda self, y, x: y * 2 if HAS(self.odd(y), "shape") else y,
}
"""All of them ask whether a child gave something."""

IS = operator.is_
IS_NONE = functools.partial(operator.is_, None)
HAS = hasattr

REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "autocast that changes nothing": (_in_autocast, "enters autocast"),
    "enable_grad that changes nothing": (_with_gradients, "enters no_grad or enable_grad"),
    "fork_rng": (_forked, "enters fork_rng"),
    "except": (_caught, "catches exceptions"),
    "bare except": (_caught_bare, "catches exceptions"),
    "match": (_matched, "uses a match statement"),
    "a hook for one call": (_hooked, "registers a hook"),
    "a parameter for one call": (_generated, ""),
    "logging": (_logged, "logs a message"),
    "print": (lambda self, y, x: print("a step") or y, "prints"),
    "zero_grad": (lambda self, y, x: self.conv1.zero_grad() or y, "zero_grad"),
    "dict.get": (_looked_up, "looks up a computed value"),
    "in a set": (_member, "looks up a computed value"),
    "str": (_as_text, "converts a computed value to text"),
    "f-string": (
        lambda self, y, x: y * {"5": 2.0}.get(f"{x.shape[-1]}", 1.0),
        "converts a computed value to text",
    ),
    "hasattr": (
        lambda self, y, x: y * (2 if hasattr(x, "tensors") else 1),
        "has the attribute 'tensors'",
    ),
    "getattr": (lambda self, y, x: y * getattr(x, "scale", 2.0), "has the attribute 'scale'"),
    "type": (lambda self, y, x: y**2 if type(x) is Tensor else y, "asks for the type"),
    "__class__": (lambda self, y, x: y**2 if x.__class__ is Tensor else y, "asks for the class"),
    "singledispatch": (lambda self, y, x: prepare(y), "asks for the class"),
    "tree_map": (lambda self, y, x: tree_map(lambda t: t * 3, y), "asks for the structure"),
    "callable": (lambda self, y, x: y * 2 if callable(x) else y, "is callable"),
    "id": (lambda self, y, x: y * (2 if id(x) == id(X) else 1), "asks for the id of"),
    "a return at once": (_returned, "with None"),
    "a conditional expression": (_conditional, "with None"),
    "a walrus": (_walrus, "with None"),
    "a comprehension": (_filtered, "with None"),
    "a generator": (_generated_sum, "with None"),
    "a nested function": (_nested, "with None"),
    "a function of any values": (_helper, "with None"),
    "the result of a function": (_called, "with None"),
    "a child that hands None on": (_handed_on, "with None"),
    "a dtype": (_of_dtype, "by identity"),
    "suppress": (_suppressed, "catches exceptions"),
    "dir": (lambda self, y, x: y * (2 if "tensors" in dir(x) else 1), "asks for the attributes"),
    "builtins": (lambda self, y, x: y * (2 if builtins.hasattr(x, "tensors") else 1), "builtins"),
    "a function that only compares": (
        lambda self, y, x: y * 2 if _exists(self.aux(x)) else y,
        "with None",
    ),
    "is": (_same, "by identity"),
    "a gradient that is None": (_gradient, "with None"),
    "a child that returns None": (_childless, "with None"),
    "its own __call__": (lambda self, y, x: self.scaled(y), "defines its own __call__"),
    "a ContextVar": (lambda self, y, x: y * CONTEXT.get(), "ContextVar"),
    "threading.local": (lambda self, y, x: y * LOCAL.value, "local"),
    "numpy.sum": (lambda self, y, x: y * np.sum(x.shape), "NumPy"),
}


def _outcomes(model: nn.Module) -> list[Tensor]:
    """Results, gradients and buffers of steps on batches that differ in what a forward asks."""
    found: list[Tensor] = []
    for x in (X, X[..., :4, :4], X[:3]):
        y = model(x)
        y.square().mean().backward()
        found.append(y.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.append(model(X).detach())
    with torch.no_grad():
        y = model(X)
        found += [y.detach(), torch.tensor(float(y.requires_grad))]
    found += [model.eval()(X).detach()]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    return [*found, *model.state_dict().values()]


def _assert_same(make: Callable[[], nn.Module], outcomes: Any = _outcomes) -> nn.Module:
    torch.manual_seed(0)
    plain = perturb(make())
    torch.manual_seed(0)
    model = bnrewrite.convert(perturb(make()))
    torch.manual_seed(1)
    expected = outcomes(plain)
    torch.manual_seed(1)
    for one, other in zip(outcomes(model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    return model


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_graph_can_keep_runs_as_it_is(what: str) -> None:
    do, reason = REFUSED[what]
    model = _assert_same(lambda: Net(do))
    (skip,) = bnrewrite.report(model).skipped
    assert reason in skip.reason
    assert not is_owner(model)
    assert isinstance(model.get_submodule("conv2").weight, nn.Parameter)


@pytest.mark.parametrize("do", [_optional, _optional_at_once])
@pytest.mark.parametrize("masked", [False, True])
def test_optional_members(do: Callable[..., Any], masked: bool) -> None:
    mask = X[:, :1] if masked else None
    batches = [Batch(X, mask)]
    if do is _optional:
        batches.append({"x": X, "mask": mask} if masked else {"x": X})  # pyright: ignore
    for batch in batches:
        _assert_same(lambda: Net(do), lambda model, batch=batch: [model(batch)])


@pytest.mark.parametrize("what", COMPARED)
def test_what_is_none_only_in_calls_is_noticed_wherever_it_is(what: str) -> None:
    model = _assert_same(lambda: Net(COMPARED[what]))
    (skip,) = bnrewrite.report(model).skipped
    assert "with None" in skip.reason or "calls " in skip.reason or "operator" in skip.reason
    assert not is_owner(model)


@pytest.mark.parametrize(
    "do",
    [
        lambda self, y, x: _added(y, self.hands.inner(y)[0]),
        lambda self, y, x: _added(y, {"x": x}.get("x")[0]),  # pyright: ignore
    ],
    ids=["of a child", "of an argument"],
)
def test_an_element_that_may_be_none(do: Callable[..., Any]) -> None:
    model = bnrewrite.convert(Net(do))
    assert "with None" in bnrewrite.report(model).skipped[0].reason


class Direct(nn.Module):
    """Calls the forward of its child by its name."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return self.child.forward(self.bn(self.conv(x)))


class Optional(nn.Module):
    """Asks what a child gives."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = Odd()

    def forward(self, x: Tensor) -> Tensor:
        y = self.odd(x)
        return x if y is None else y * 2


def test_a_forward_that_is_called_by_its_name_compares() -> None:
    model = _assert_same(lambda: Direct(Optional()), lambda model: [model(X), model(X[:3])])
    assert not is_owner(model)


def test_code_is_given_back() -> None:
    before = Net.forward.__code__, _exists.__code__, Result.is_empty.fget.__code__  # pyright: ignore
    for what in ("a property", "an element"):
        bnrewrite.convert(Net(COMPARED[what]))
    bnrewrite.convert(Net(REFUSED["a function that only compares"][0]))
    after = Net.forward.__code__, _exists.__code__, Result.is_empty.fget.__code__  # pyright: ignore
    assert all(one is other for one, other in zip(after, before, strict=True))


def _numpy_number(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return np.float64(3.0) * (y / np.sqrt(2.0)) + np.float32(1) - y.mean(np.int64(1), keepdim=True)  # pyright: ignore


def _asserted(self: Net, y: Tensor, x: Tensor) -> Tensor:
    torch._assert(x.dim() == 4, f"expected four dimensions, got {x.dim()}")
    return y * 2


def _added(x: Any, other: Any = None) -> Any:
    return x if other is None else x + other


def _chunked(self: Net, y: Tensor, x: Tensor) -> Tensor:
    first, second = y.chunk(2, 1)
    return y * _added(first, second)[:, :1]


def _resized(y: Tensor, height: Any = None) -> Tensor:
    return y if height is None else F.interpolate(y, size=(height, height))


CAPTURED: dict[str, Callable[..., Any]] = {
    "a chunk for an optional argument": _chunked,
    "a part that torch splits": lambda self, y, x: _added(y, torch.split(y, 1, 1)[1]),
    "a slice for an optional argument": lambda self, y, x: _added(y, y[:, :1]),
    "a size for an optional argument": lambda self, y, x: _resized(y, y.shape[2:][0]),
    "an element of a sum": lambda self, y, x: _added(y, (y + 1)[0]),
    "an element of a layer": lambda self, y, x: _added(y, self.conv1(x)[0]),
    "numbers of numpy": _numpy_number,
    "the first of a sum": _accumulated,
    "hasattr of what tensors have": lambda self, y, x: y * 2 if hasattr(x, "shape") else y,
    "hasattr of a module": lambda self, y, x: y if hasattr(self, "nothing") else y * 2,
    "type of a module": lambda self, y, x: y * (2 if type(self.conv1) is nn.Conv2d else 1),
    "type as a class": lambda self, y, x: y * (2 if isinstance(nn.Conv2d, type) else 1),
    "the type of a class": lambda self, y, x: y * (2 if type(nn.Conv2d) is type else 1),
    "an assertion": _asserted,
    "nullcontext": lambda self, y, x: contextlib.nullcontext(y).__enter__() * 2,
    "finally": lambda self, y, x: _cleaned_up(y),
    "an element that is there": lambda self, y, x: y if [y * 2][0] is None else y * 2,
    "a value and itself": lambda self, y, x: y * 2 if [y][0] is y else y,
}


def _cleaned_up(y: Tensor) -> Tensor:
    try:
        return y * 2
    finally:
        y = y + 1


@pytest.mark.parametrize("what", CAPTURED)
def test_what_a_graph_can_keep_is_captured(what: str) -> None:
    model = _assert_same(lambda: Net(CAPTURED[what]))
    assert is_owner(model), bnrewrite.report(model).skipped


def _set(model: Any, name: str, value: float) -> None:
    if name == "args":
        model.args.scale = value
    elif name == "slots":
        model.slots.scale = value
    elif name == "users":
        model.users["scale"] = value
    else:
        TABLE["scale"] = value


READS: dict[str, Callable[..., Any]] = {
    "args": lambda self, y, x: y * self.args.scale,
    "slots": lambda self, y, x: y * self.slots.scale,
    "users": lambda self, y, x: y * self.users["scale"],
    "view": lambda self, y, x: y * self.view["scale"],
}


@pytest.mark.parametrize("what", READS)
def test_objects_of_pythons_library_and_slots_are_compared(what: str) -> None:
    def outcomes(model: nn.Module) -> list[Tensor]:
        try:
            first = model(X)
            _set(model, what, 3.0)
            return [first, model(X)]
        finally:
            _set(model, what, 1.0)

    assert is_owner(_assert_same(lambda: Net(READS[what]), outcomes))


def test_slots_that_a_trace_changed_are_given_back() -> None:
    def count(self: Net, y: Tensor, x: Tensor) -> Tensor:
        self.slots.scale += 1
        return y * self.slots.scale

    model = _assert_same(lambda: Net(count))
    assert "changes an attribute" in bnrewrite.report(model).skipped[0].reason


def test_a_package_with_a_name_of_pythons_library_is_looked_into() -> None:
    names = {"__name__": "code.net", "SCALE": 1.0}
    exec("def do(self, y, x): return y * SCALE", names)

    def outcomes(model: nn.Module) -> list[Tensor]:
        names["SCALE"] = 1.0
        first = model(X)
        names["SCALE"] = 3.0
        return [first, model(X)]

    _assert_same(lambda: Net(names["do"]), outcomes)  # pyright: ignore


@pytest.mark.parametrize(
    ("do", "change"),
    [
        (
            lambda self, y, x: y * 2 if torch.backends.mkldnn.enabled else y,
            functools.partial(torch.backends.mkldnn.flags, enabled=False),
        ),
        (
            lambda self, y, x: y * 2 if torch.is_anomaly_enabled() else y,
            functools.partial(torch.autograd.set_detect_anomaly, True),
        ),
    ],
    ids=["backends", "anomaly"],
)
def test_what_torch_is_set_to_is_compared(do: Any, change: Any) -> None:
    def outcomes(model: nn.Module) -> list[Tensor]:
        first = model(X)
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            # Of Intel GPUs, which nobody asked for.
            warnings.simplefilter("ignore")
            stack.enter_context(change())
            return [first, model(X)]

    assert is_owner(_assert_same(lambda: Net(do), outcomes))


class Plain(nn.Module):
    """A site that calls its module, and as a functional call."""

    def __init__(self, calls: bool = False) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.batch_norm(y, None, None, training=True) if self.calls else y


class Recursive(nn.Module):
    """A module that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        y = self.bn(self.conv(x))
        return y if depth == 0 else y + self(y, depth - 1)


def test_a_module_that_calls_itself() -> None:
    model = _assert_same(Recursive)
    assert "calls itself" in bnrewrite.report(model).skipped[0].reason
    assert str(bnrewrite.report(model))


def test_another_thread_goes_on_while_a_model_is_converted() -> None:
    other = perturb(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())).eval()
    expected, failed, ends = other(X), [], threading.Event()

    def go_on() -> None:
        while not ends.is_set():
            try:
                if not torch.equal(other(X), expected):
                    failed.append("another result")
            except Exception as error:
                failed.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        models = [bnrewrite.convert(Net(lambda self, y, x: y)) for _ in range(10)]
    finally:
        ends.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not failed
    assert all(map(is_owner, models))


def test_another_thread_runs_graphs_while_a_model_is_converted() -> None:
    """Those with calls of ``F.batch_norm``, which torch.fx itself would not keep."""
    other = bnrewrite.convert(perturb(Plain(calls=True))).eval()
    expected, failed, ends = other(X), [], threading.Event()

    def go_on() -> None:
        while not ends.is_set():
            try:
                torch.testing.assert_close(other(X), expected)
            except Exception as error:
                failed.append(repr(error))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for _ in range(10):
            bnrewrite.convert(Net(lambda self, y, x: y))
    finally:
        ends.set()
        thread.join()
    assert not failed


def test_other_tracers_of_torch_record_what_a_graph_does() -> None:
    model = bnrewrite.convert(perturb(Plain(calls=True)))
    traced = make_fx(model)(X)
    torch.testing.assert_close(traced(X), model(X))


def test_a_child_that_asks_whether_its_argument_is_none() -> None:
    """Calls with None run no graph of the child, so its graph is no part of another."""

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor, mask: Any) -> Tensor:
            y = self.bn(self.conv(x))
            return y if mask is None else y * mask

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Masks(), Masks()

        def forward(self, x: Any) -> Tensor:
            return self.one(x.x, x.mask) + self.two(x.x, x.mask)

    for mask in (None, X[:, :1]):
        _assert_same(Two, lambda model, mask=mask: [model(Batch(X, mask))])


def test_builtins_of_the_code_are_as_they_were() -> None:
    before = dict(globals())
    for what in ("hasattr", "getattr", "type", "id", "print", "callable"):
        bnrewrite.convert(Net(REFUSED[what][0]))
    assert {name: value for name, value in globals().items() if before.get(name) is not value} == {}


def test_a_part_that_is_converted_anew_leaves_the_graph_around_it() -> None:
    model: Any = bnrewrite.convert(Net(lambda self, y, x: y))
    model(X)
    before = model.bn1.running_mean.clone()
    bnrewrite.convert(model.bn1, mode="frozen")
    model(X)
    assert torch.equal(model.bn1.running_mean, before)
    assert int(model.bn2.num_batches_tracked) == 2
    sites = bnrewrite.report(model).sites
    assert sorted(site.mode for site in sites) == ["frozen", "sync"]


def test_symbolic_traces_of_torch_keep_the_modules_of_sites() -> None:
    for training in (True, False):
        model = bnrewrite.convert(perturb(Plain())).train(training)
        traced = torch.fx.symbolic_trace(model)
        called = [node.target for node in traced.graph.find_nodes(op="call_module")]
        assert called == ["conv", "bn"]
        torch.testing.assert_close(traced(X), model(X))


def test_symbolic_traces_of_calls_of_batch_norm_are_refused() -> None:
    model = bnrewrite.convert(Plain(calls=True))
    refused = r"^batch_norm \(.*test_decisions\.py:\d+\): torch\.fx would trace"
    with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=refused):
        torch.fx.symbolic_trace(model)
