"""An export leaves no trace in the model, whatever its forward changes."""

import collections
import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnrewrite
from tests import IS_TORCH_211

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Record:
    """An object of the user's."""

    count = 0

    def __init__(self) -> None:
        self.lines: list[int] = []


class Slotted:
    """An object of the user's without a dictionary."""

    __slots__ = ("count", "late")

    def __init__(self) -> None:
        self.count = 0


@dataclasses.dataclass
class State:
    """An object with a tensor."""

    total: Tensor


class Counts(dict):
    """A dictionary of the user's."""

    def clear(self) -> None:
        raise AssertionError("the user's method ran")


def _counter() -> Callable[[], int]:
    count = 0

    def add() -> int:
        nonlocal count
        count += 1
        return count

    return add


def _of_record(record: Any) -> Any:
    return record.count, list(record.lines), list(vars(record))


def _count(held: Any) -> None:
    held.count += 1


def _late(held: Any) -> None:
    held.late = 1


def _append(held: Any) -> None:
    held.append(1)


def _add(held: Any) -> None:
    held.add_(1)


def _replace(held: Any) -> None:
    held.data = held.data * 2


def _first(held: Any) -> None:
    held.move_to_end("a")


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "list in a dict": (lambda: {"a": []}, lambda held: held["a"].append(1), str),
    "list in a tuple": (lambda: ([],), lambda held: held[0].append(1), str),
    "deque": (lambda: collections.deque([0], 3), _append, str),
    "set in a list": (lambda: [set()], lambda held: held[0].add(1), str),
    "order": (lambda: collections.OrderedDict(a=1, b=2), _first, str),
    "dict of the user's": (lambda: Counts(a=1), lambda held: held.update(b=2), str),
    "object": (Record, _count, _of_record),
    "list of an object": (Record, lambda held: held.lines.append(1), _of_record),
    "slot": (Slotted, _count, lambda held: held.count),
    "new slot": (Slotted, _late, lambda held: hasattr(held, "late")),
    "namespace": (lambda: SimpleNamespace(count=0), _count, str),
    "partial": (lambda: functools.partial(list, []), lambda held: held.args[0].append(1), str),
    "method": (lambda: [].append, lambda held: held(1), lambda held: str(held.__self__)),
    "closure": (_counter, lambda held: held(), lambda held: held.__closure__[0].cell_contents),
    "array": (lambda: np.zeros(3), lambda held: np.add(held, 1, out=held), str),
    "generator": (
        torch.Generator, lambda held: torch.rand(1, generator=held), torch.Generator.get_state,
    ),
    "tensor": (lambda: torch.zeros(5), _add, str),
    "view": (lambda: torch.zeros(5)[1:3], _add, lambda held: str(held._base)),
    "tensor of an object": (lambda: State(torch.zeros(1)), lambda held: held.total.add_(1), str),
    "data": (lambda: torch.zeros(5), lambda held: held.data.add_(1), str),
    "data of another size": (lambda: torch.ones(5), lambda held: held.resize_(9).fill_(2), str),
    "data replaced": (lambda: nn.Parameter(torch.ones(5)), _replace, str),
    "tensor expanded": (lambda: torch.ones(1).expand(3), lambda held: held[0].add_(1), str),
    "attribute of a tensor": (
        lambda: torch.zeros(5), lambda held: setattr(held, "mark", 1), lambda held: vars(held),
    ),
}  # fmt: skip


class Changes(nn.Module):
    """A forward that changes something that the model holds, and may fail then."""

    def __init__(self, held: Any, change: Callable[[Any], Any], *, fails: bool = False) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.held = held
        self.change = change
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.change(self.held)
        if self.fails:
            raise RuntimeError("after the change")
        return self.bn(x)


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("name", CASES)
def test_what_a_forward_changes_is_put_back_where_it_fails(name: str) -> None:
    make, change, look = CASES[name]
    held = make()
    model = Changes(held, change, fails=True)
    before, attributes = look(held), dict(model.__dict__)
    with pytest.raises(bnrewrite.ExportError, match="after the change"):
        bnrewrite.export_onnx(model, (X,))
    assert _same(look(held), before)
    assert list(model.__dict__) == list(attributes)
    assert all(model.__dict__[key] is one for key, one in attributes.items())


# torch does not take forwards that change tensors which are no buffers, or numpy's arrays.
TRACED = [name for name in CASES if not any(one in name for one in ("tens", "data", "view", "arr"))]


@pytest.mark.parametrize("name", TRACED)
def test_what_a_forward_changes_is_put_back(name: str) -> None:
    if IS_TORCH_211 and name == "generator":
        pytest.skip("torch.export takes none there")
    make, change, look = CASES[name]
    held = make()
    before = look(held)
    bnrewrite.export_onnx(Changes(held, change), (X,))
    assert _same(look(held), before)


@pytest.mark.parametrize("size", [1, 5])
def test_a_tensor_that_tracing_changes_is_put_back(size: int) -> None:
    held = torch.zeros(size)
    with pytest.raises(bnrewrite.ExportError, match="register it as buffer"):
        bnrewrite.export_onnx(Changes(held, _add), (X,))
    assert not held.any()


def test_each_run_begins_with_what_the_model_holds() -> None:
    """The first call scales by one, in the comparison on a second size too."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.record = Record()

        def forward(self, x: Tensor) -> Tensor:
            self.record.count += 1
            return self.bn(x) * self.record.count

    model = Scales()
    report = bnrewrite.export_onnx(model, (X,), dynamic_shapes=[{0: "batch"}])
    assert report.verified == (2, 3)
    assert model.record.count == 0


def test_what_is_reached_by_a_weak_reference_is_put_back() -> None:
    record = Record()

    def change(held: Any) -> None:
        held().lines.append(1)

    bnrewrite.export_onnx(Changes(weakref.ref(record), change), (X,))
    assert record.lines == []


class Registered(type):
    """A metaclass that keeps a list."""

    classes: list[type] = []  # noqa: RUF012

    def __init__(cls, *args: Any) -> None:
        super().__init__(*args)
        Registered.classes.append(cls)


class Closes(metaclass=Registered):
    """An object that closes a file when it goes."""

    subclasses: list[type] = []  # noqa: RUF012

    def __init__(self, file: Any, bn: nn.Module | None = None) -> None:
        self.file = file
        self.bn = bn

    def __init_subclass__(cls) -> None:
        Closes.subclasses.append(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in ("file", "bn"), "the user's method ran"
        super().__setattr__(name, value)

    def __del__(self) -> None:
        self.file.close()


class ClosesInSlot:
    """Likewise, without a dictionary."""

    __slots__ = ("bn", "file")

    def __init__(self, file: Any, bn: nn.Module) -> None:
        self.file = file
        self.bn = bn

    def __del__(self) -> None:
        self.file.close()


class ClosingList(list):
    """Likewise, a list."""

    file: Any

    def __del__(self) -> None:
        self.file.close()


class ClosingModule(nn.Module):
    """Likewise, a module, which may hold another object that does."""

    def __init__(self, kind: str, file: Any) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.file = file
        self.held: Any = None
        if kind == "object":
            self.held = Closes(file)
        elif kind == "object with a layer":
            self.held = Closes(file, self.bn)
        elif kind == "slots":
            self.held = ClosesInSlot(file, self.bn)
        elif kind == "list":
            self.held = ClosingList([self.bn])
            self.held.file = file

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)

    def __del__(self) -> None:
        self.file.close()


@pytest.mark.parametrize("kind", ["module", "object", "object with a layer", "slots", "list"])
@pytest.mark.parametrize("fails", [False, True])
def test_what_closes_a_file_when_it_goes_does_so_once(
    kind: str, fails: bool, tmp_path: Any
) -> None:
    if IS_TORCH_211 and fails:
        pytest.skip("torch.export itself keeps what it cannot trace there")
    file = (tmp_path / "log.txt").open("w")
    model = ClosingModule(kind, file)
    classes = list(Registered.classes)
    if fails:
        model.bn.register_forward_hook(lambda _module, _args, y: y if y.sum() > 0 else -y)
        with pytest.raises(bnrewrite.ExportError, match="cannot trace"):
            bnrewrite.export_onnx(model, (X,))
    else:
        bnrewrite.export_onnx(model, (X,))
    gc.collect()
    assert not file.closed
    assert (Registered.classes, Closes.subclasses) == (classes, [])
    del model
    gc.collect()
    assert file.closed
