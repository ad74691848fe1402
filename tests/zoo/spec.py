"""One model of the zoo, how it is called, and how often it may evaluate BatchNorm by right."""

import dataclasses
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One model with arguments for it.

    Attributes:
        suite: the collection that it is from.
        name: its name there.
        make: makes the model, with random weights, on the default device.
        arguments: arguments for a batch of the given size, on the default device, for a model.
        device: where a count runs: "meta" costs no arithmetic, but some code reads values.
        batch_size: of that count.
        family: models of one family are made by the same code; the name if nothing else is known.
        axes: names of the axes that vary in an export, for each tensor; the first one if not given.
    """

    suite: str
    name: str
    make: Callable[[], nn.Module]
    arguments: Callable[[nn.Module, int], Call]
    device: str = "meta"
    batch_size: int = 2
    family: str = ""
    axes: tuple[dict[int, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.suite}/{self.name}"

    def build(self) -> nn.Module:
        """The model in training mode, on the device of the spec."""
        with torch.device(self.device), _SkipInitialization():
            return self.make().train()

    def call(self, model: nn.Module) -> Call:
        """Arguments on the device of the spec."""
        with torch.device(self.device):
            return self.arguments(model, self.batch_size)


class _SkipInitialization(TorchFunctionMode):
    """Leaves tensors on the meta device alone, where initializing them takes seconds and says
    nothing.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if (
            isinstance(tensor, Tensor)
            and tensor.is_meta
            and (func in _IN_PLACE or getattr(func, "__module__", "") == "torch.nn.init")
        ):
            return tensor
        return func(*args, **kwargs)


_IN_PLACE = frozenset(
    getattr(Tensor, f"{name}_")
    for name in ("uniform", "normal", "erfinv", "mul", "add", "clamp", "fill", "zero", "copy")
)

Suite = Callable[[], Iterator[Spec]]


def images(height: int, width: int | None = None) -> Callable[[nn.Module, int], Call]:
    """Arguments maker: one batch (n, 3, height, width)."""
    return lambda model, n: ((torch.rand(n, 3, height, width or height),), {})


def num_batch_norms(model: nn.Module) -> int:
    """BatchNorm modules of ``model``, run or not."""
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def may_evaluate(model: nn.Module) -> bool:
    """Whether ``model`` holds BatchNorm, or code of its modules names it."""
    return num_batch_norms(model) > 0 or any(
        _mentions(cls.__module__)
        for cls in {base for module in model.modules() for base in type(module).__mro__}
        if issubclass(cls, nn.Module) and not cls.__module__.startswith("torch.")
    )


@functools.cache
def _mentions(module: str) -> bool:
    return "batch_norm(" in inspect.getsource(sys.modules[module])


_NO_SITES = ("InstanceNorm", "StdConv", "WeightStandardizedConv")


class CountOthers:
    """Counts calls of modules that evaluate BatchNorm once each and are no sites by right.

    These are InstanceNorm, which does so in C++, and convolutions that standardize their weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_calls = 0
        self._modules = [
            module
            for module in model.modules()
            if any(name in type(module).__name__ for name in _NO_SITES)
        ]
        self._handles: list[Any] = []

    def __enter__(self) -> "CountOthers":
        self._handles = [module.register_forward_hook(self._count) for module in self._modules]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, module: nn.Module, args: object, output: object) -> None:
        self.num_calls += 1


class MissingPackage(Exception):  # noqa: N818
    """A collection is not installed, or cannot be imported; the message says why."""


def require(*packages: str, extra: str = "zoo") -> None:
    """Raises :class:`MissingPackage` for the first package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"{package} is not installed: pip install 'bnrewrite[{extra}]'")
