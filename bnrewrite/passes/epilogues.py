"""What may follow a BatchNorm and become part of it: which nodes add and which activate."""

import dataclasses
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bnrewrite.passes.torch_calls import Does, function_does
from bnrewrite.sites.classes import below, original_class

_aten = torch.ops.aten

_ADDITIONS = (operator.add, operator.iadd, torch.add, _aten.add.Tensor, _aten.add_.Tensor)
_ADD_METHODS = ("add", "add_", "__add__", "__radd__", "__iadd__")
_IN_PLACE = (operator.iadd, _aten.add_.Tensor, "add_", "__iadd__")


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation as the op ``batch_norm_act`` takes it.

    Attributes:
        name: one of :data:`bnrewrite.activations.ACTIVATIONS`.
        slope: of ``leaky_relu``.
        flags: names of the attributes of the module that decide about it.
    """

    name: str
    slope: float = 0.0
    flags: tuple[str, ...] = ()


def _relu(**_: Any) -> Activation:
    return Activation("relu")


def _relu6(**_: Any) -> Activation:
    return Activation("relu6")


def _leaky_relu(negative_slope: Any = 0.01, **_: Any) -> Activation | None:
    if isinstance(negative_slope, (int, float)):
        return Activation("leaky_relu", float(negative_slope), ("negative_slope",))
    return None


def _silu(**_: Any) -> Activation:
    return Activation("silu")


def _gelu(approximate: Any = "none", **_: Any) -> Activation | None:
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return None if name is None else Activation(name, 0.0, ("approximate",))


def _hardswish(**_: Any) -> Activation:
    return Activation("hardswish")


def _hardtanh(min_val: Any = -1.0, max_val: Any = 1.0, **_: Any) -> Activation | None:
    if (min_val, max_val) != (0, 6):
        return None
    return Activation("relu6", 0.0, ("min_val", "max_val"))


Make = Callable[..., Activation | None]

_MODULES: dict[type[nn.Module], Make] = {
    nn.ReLU: _relu,
    nn.ReLU6: _relu6,
    nn.LeakyReLU: _leaky_relu,
    nn.SiLU: _silu,
    nn.GELU: _gelu,
    nn.Hardswish: _hardswish,
    nn.Hardtanh: _hardtanh,
}

_FORWARDS = {cls: cls.forward for cls in _MODULES}

_FUNCTIONS: dict[Any, tuple[Make, tuple[str, ...]]] = {
    F.relu: (_relu, ("input", "inplace")),
    F.relu_: (_relu, ("input",)),
    torch.relu: (_relu, ("input",)),
    torch.relu_: (_relu, ("input",)),
    F.relu6: (_relu6, ("input", "inplace")),
    F.leaky_relu: (_leaky_relu, ("input", "negative_slope", "inplace")),
    F.leaky_relu_: (_leaky_relu, ("input", "negative_slope")),
    F.silu: (_silu, ("input", "inplace")),
    F.gelu: (_gelu, ("input", "approximate")),
    F.hardswish: (_hardswish, ("input", "inplace")),
    F.hardtanh: (_hardtanh, ("input", "min_val", "max_val", "inplace")),
    # What torch.export makes of these.
    _aten.relu.default: (_relu, ("self",)),
    _aten.relu_.default: (_relu, ("self",)),
    _aten.relu6.default: (_relu6, ("self",)),
    _aten.leaky_relu.default: (_leaky_relu, ("self", "negative_slope")),
    _aten.leaky_relu_.default: (_leaky_relu, ("self", "negative_slope")),
    _aten.silu.default: (_silu, ("self",)),
    _aten.silu_.default: (_silu, ("self",)),
    _aten.gelu.default: (_gelu, ("self", "approximate")),
    _aten.hardswish.default: (_hardswish, ("self",)),
    _aten.hardswish_.default: (_hardswish, ("self",)),
    _aten.hardtanh.default: (_hardtanh, ("self", "min_val", "max_val")),
    _aten.hardtanh_.default: (_hardtanh, ("self", "min_val", "max_val")),
}

_METHODS: dict[str, Make] = {"relu": _relu, "relu_": _relu}


def activation_of(owner: nn.Module, node: fx.Node) -> Activation | None:
    """The activation that ``node`` is, if it is one that can be part of a normalization."""
    if node.op == "call_module":
        module = below(owner, str(node.target))
        cls = original_class(module)
        make = _MODULES.get(cls)
        if make is None or len(node.args) != 1 or node.kwargs:
            return None
        if cls.forward is not _FORWARDS[cls] or cls.forward.__module__ != cls.__module__:
            # Somebody has replaced torch's.
            return None
        names = inspect.signature(make).parameters
        return make(**{name: getattr(module, name) for name in names if name in module.__dict__})
    if node.op == "call_method" and node.target in _METHODS and len(node.args) == 1:
        return _METHODS[str(node.target)]()
    if node.op == "call_function" and node.target in _FUNCTIONS:
        make, names = _FUNCTIONS[node.target]
        values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        values.pop(names[0], None)
        # A value that the graph computes cannot be part of a node.
        if set(values) <= set(names) and not any(isinstance(v, fx.Node) for v in values.values()):
            return make(**values)
    return None


def is_addition(node: fx.Node) -> bool:
    """Whether ``node`` adds two values of the graph that are not the same one."""
    known = (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    return (
        known
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(value, fx.Node) for value in node.args)
        and node.args[0] is not node.args[1]
    )


def writes_into(node: fx.Node) -> fx.Node | None:
    """The value that an addition changes in place."""
    return node.args[0] if node.target in _IN_PLACE else None  # pyright: ignore[reportReturnType]


def may_be_number(node: fx.Node) -> bool:
    """Whether what a graph adds to the result of a site may be a number: a child gives anything."""
    if node.op == "call_module":
        return True
    return (
        node.op == "call_function"
        and Does.ARITHMETIC in function_does(node)
        and all(map(may_be_number, node.all_input_nodes))
    )


def is_identity(owner: nn.Module, node: fx.Node) -> bool:
    """Whether ``node`` calls a module that returns what it is given."""
    return (
        node.op == "call_module"
        and original_class(below(owner, str(node.target))) is nn.Identity
        and len(node.args) == 1
        and not node.kwargs
    )
