"""From the specification of a random network, plain dictionaries, to modules."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.fuzz import layers
from tests.fuzz.norms import make_norm

Spec = dict[str, Any]

HOOKS = {
    "forward": lambda module: module.register_forward_hook(layers.double_output),
    "pre": lambda module: module.register_forward_pre_hook(layers.shift_input, with_kwargs=True),
}


@dataclasses.dataclass
class Builder:
    """Makes modules for ``num_dims`` spatial dimensions and remembers what may be used again."""

    num_dims: int
    norms: list[_BatchNorm] = dataclasses.field(default_factory=list)
    blocks: list[tuple[int, int, nn.Module]] = dataclasses.field(default_factory=list)

    def make(self, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
        """The module of ``spec`` for ``num_in`` channels, and how many channels it returns."""
        module, num_out = _MAKERS[spec["kind"]](self, spec, num_in)
        if spec.get("hook"):
            HOOKS[spec["hook"]](module)
        self.blocks.append((num_in, num_out, module))
        return module, num_out

    def make_as(self, spec: Spec, num_in: int, num_out: int) -> nn.Module:
        """The module of ``spec``, with a projection behind it where the channels do not fit."""
        module, num = self.make(spec, num_in)
        return module if num == num_out else nn.Sequential(module, self.conv(num, num_out))

    def norm(self, spec: Spec, num_channels: int) -> _BatchNorm:
        """A BatchNorm, perhaps one that is in use elsewhere."""
        if spec["alias"]:
            for norm in self.norms:
                if norm.num_features == num_channels:
                    return norm
        norm = make_norm(spec, num_channels, self.num_dims)
        self.norms.append(norm)
        return norm

    def conv(self, num_in: int, num_out: int, kernel: int = 1, bias: bool = True) -> nn.Module:
        """A linear layer or convolution."""
        return layers.make_conv(num_in, num_out, self.num_dims, kernel=kernel, bias=bias)

    def parts(self, specs: list[Spec], num_in: int, how: str) -> tuple[list[nn.Module], int]:
        """Parallel modules whose results can be joined by ``how``, and the joined channels."""
        if how == "cat":
            made = [self.make(spec, num_in) for spec in specs]
            return [module for module, _ in made], sum(num for _, num in made)
        first, num_out = self.make(specs[0], num_in)
        return [first, *(self.make_as(spec, num_in, num_out) for spec in specs[1:])], num_out


_MAKERS: dict[str, Callable[[Builder, Spec, int], tuple[nn.Module, int]]] = {}


def _maker(kind: str) -> Callable[..., Any]:
    def register(function: Callable[[Builder, Spec, int], tuple[nn.Module, int]]) -> Any:
        _MAKERS[kind] = function
        return function

    return register


@_maker("conv")
def _conv(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    if spec["standardized"]:
        return layers.Standardized(num_in, spec["out"]), spec["out"]
    return build.conv(num_in, spec["out"], spec["kernel"], spec["bias"]), spec["out"]


@_maker("norm")
def _norm(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    return build.norm(spec, num_in), num_in


@_maker("act")
def _act(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    return layers.ACTIVATIONS[spec["name"]](), num_in


@_maker("dropout")
def _dropout(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    return nn.Dropout(0.4), num_in


@_maker("seq")
def _seq(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    modules = []
    for child in spec["children"]:
        module, num_in = build.make(child, num_in)
        modules.append(module)
    return nn.Sequential(*modules), num_in


@_maker("unit")
def _unit(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    num_out = spec["out"]
    norm = build.norm(spec["norm"], num_in if spec["style"] == "before" else num_out)
    return layers.Unit(build.conv(num_in, num_out, 3), norm, spec["act"], spec["style"]), num_out


@_maker("residual")
def _residual(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    body, num_out = build.make(spec["body"], num_in)
    shortcut = None
    if spec["shortcut"] is not None:
        shortcut = build.make_as(spec["shortcut"], num_in, num_out)
    elif num_in != num_out:
        shortcut = build.conv(num_in, num_out)
    return layers.Residual(body, shortcut, spec["act"], spec["style"]), num_out


@_maker("branches")
def _branches(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    modules, num_out = build.parts(spec["children"], num_in, spec["join"])
    return layers.Branches(modules, spec["container"], spec["join"]), num_out


@_maker("views")
def _views(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    encoder, num_out = build.make(spec["body"], num_in)
    return layers.Views(encoder, spec["join"]), num_out * (2 if spec["join"] == "cat" else 1)


@_maker("functional")
def _functional(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    return layers.Functional(num_in, spec), num_in


@_maker("unused")
def _unused(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    body, num_out = build.make(spec["body"], num_in)
    return layers.Unused(build.norm(spec["norm"], num_in), body, spec["first"]), num_out


@_maker("pair")
def _pair(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    (first, second), num_out = build.parts(spec["children"], num_in, spec["join"])
    return layers.Unpack(layers.Pair(first, second, spec["as_dict"]), spec["join"]), num_out


@_maker("auxiliary")
def _auxiliary(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    (body, extra), num_out = build.parts(spec["children"], num_in, "sum")
    return layers.Auxiliary(body, extra), num_out


@_maker("teacher")
def _teacher(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    (body, teacher), num_out = build.parts(spec["children"], num_in, "sum")
    return layers.Teacher(body, teacher), num_out


@_maker("untraceable")
def _untraceable(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    body, num_out = build.make(spec["body"], num_in)
    return layers.Untraceable(build.norm(spec["norm"], num_in), body), num_out


@_maker("reads")
def _reads(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    return layers.Reads(build.norm(spec["norm"], num_in)), num_in


@_maker("late")
def _late(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    norm = build.norm(spec["norm"], spec["out"])
    other = build.make_as(spec["body"], spec["out"], spec["out"])
    return layers.Late(build.conv(num_in, spec["out"]), norm, other), spec["out"]


@_maker("chunks")
def _chunks(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    num_out = spec["out"]
    other = build.make_as(spec["body"], num_out, num_out)
    norm = build.norm(spec["norm"], num_out)
    conv = build.conv(num_in, 2 * num_out)
    style = "slice" if spec["first"] else spec["style"]
    return layers.Chunks(conv, norm, other, {"none": "operator"}.get(style, style)), num_out


@_maker("counter")
def _counter(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    body, num_out = build.make(spec["body"], num_in)
    return layers.Counter(build.norm(spec["norm"], num_in), body), num_out


@_maker("dense")
def _dense(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    modules, num_all, num_out = [], num_in, 0
    for child in spec["children"]:
        module, num = build.make(child, num_all)
        modules.append(module)
        num_all, num_out = num_all + num, num_out + num
    return layers.Dense(modules), num_out


@_maker("repeat")
def _repeat(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    return layers.Repeat(build.make_as(spec["body"], num_in, num_in), spec["num"]), num_in


@_maker("optional")
def _optional(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    body, num_out = build.make(spec["body"], num_in)
    target = layers.Optional(build.norm(spec["norm"], num_in), body)
    return layers.Caller(target, spec["style"]), num_out


@_maker("method")
def _method(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    body, num_out = _seq(build, spec, num_in)
    assert isinstance(body, nn.Sequential)
    return layers.Method(body), num_out


@_maker("switch")
def _switch(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    (first, second), num_out = build.parts(spec["children"], num_in, "sum")
    return layers.Switch(first, second), num_out


@_maker("again")
def _again(build: Builder, spec: Spec, num_in: int) -> tuple[nn.Module, int]:
    """A module that is in use elsewhere, if one takes so many channels."""
    fitting = [(num, module) for inputs, num, module in build.blocks if inputs == num_in]
    if not fitting:
        return nn.Identity(), num_in
    num_out, module = fitting[spec["index"] % len(fitting)]
    return module, num_out


class Net(nn.Module):
    """A stem that sees the input, a trunk, a head on pooled features, and outputs of some form."""

    def __init__(
        self, trunk: nn.Module, neck: nn.Module, head: nn.Module | None, outputs: str
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.neck = neck
        self.head = head
        self.outputs = outputs

    def forward(self, x: Tensor) -> Any:
        features = self.trunk(x)
        y = self.neck(features)
        if self.head is not None:
            y = self.head(y.flatten(2).mean(2) if y.dim() > 2 else y)
        if self.outputs == "tuple":
            return y, [features * 0.5]
        if self.outputs == "dict":
            return {"y": y, "features": {"x": features.sin()}}
        return y


def make_net(spec: Spec) -> nn.Module:
    """The float64 network of ``spec``, with weights that no default initialization gives."""
    torch.manual_seed(spec["seed"])
    build = Builder(spec["num_dims"])
    trunk, num = build.make(spec["trunk"], spec["num_in"])
    neck = build.norm(spec["neck"], num)
    head = None
    if spec["head"] is not None:
        head, _ = Builder(0).make(spec["head"], num)
    net = Net(trunk, neck, head, spec["outputs"]).double()
    generator = torch.Generator().manual_seed(spec["seed"] + 1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (_BatchNorm, layers.Functional)):
                for name in ("weight", "bias", "running_mean", "running_var"):
                    tensor = getattr(module, name, None)
                    if tensor is not None:
                        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                        tensor.add_(0.6 * noise - 0.3)
    return net
