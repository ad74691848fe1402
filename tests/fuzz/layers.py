"""Modules of random networks: many ways to write a forward.

Their children are made by :mod:`tests.fuzz.networks`. None of them mixes samples, apart from the
BatchNorm in them, so that ranks with parts of a batch do what one process does with all of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

CONVS = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def make_conv(num_in: int, num_out: int, num_dims: int, *, kernel: int, bias: bool) -> nn.Module:
    """A layer that keeps the spatial size: (N, num_in, *) to (N, num_out, *)."""
    if num_dims == 0:
        return nn.Linear(num_in, num_out, bias=bias)
    return CONVS[num_dims](num_in, num_out, kernel, padding=kernel // 2, bias=bias)


class Standardized(nn.Module):
    """A convolution with a kernel of one whose weight is standardized by ``F.batch_norm``."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        rows = F.batch_norm(self.weight.unsqueeze(0), None, None, training=True, eps=1e-2)
        return torch.einsum("nc...,oc->no...", x, rows.squeeze(0))


def activate(x: Tensor, name: str) -> Tensor:
    """One of the activations of functional style."""
    if name == "relu":
        return F.relu(x)
    if name == "relu_":
        return x.relu_()
    if name == "tanh":
        return torch.tanh(x)
    if name == "silu":
        return F.silu(x)
    if name == "leaky":
        return F.leaky_relu(x, 0.2, inplace=True)
    if name == "gelu":
        return F.gelu(x, approximate="tanh")
    if name == "hardswish":
        return F.hardswish(x)
    if name == "relu6":
        return F.hardtanh(x, 0, 6, inplace=True)
    if name == "method":
        return x.relu()
    return x


ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "leaky": lambda: nn.LeakyReLU(0.2, inplace=True),
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "relu6": nn.ReLU6,
    "method": nn.ReLU,
    "none": nn.Identity,
}


def join(values: Sequence[Tensor], how: str) -> Tensor:
    """Several values of one shape in one; ``cat`` adds up the channels."""
    if how == "cat":
        return torch.cat(list(values), 1)
    if how == "stack":
        return torch.stack(list(values)).mean(0)
    total = values[0]
    for value in values[1:]:
        if how == "sum_":
            total += value
        else:
            total = total * value if how == "mul" else total + value
    return total


class Unit(nn.Module):
    """Convolution, BatchNorm and activation as attributes, called in several ways."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: str, style: str) -> None:
        super().__init__()
        self.conv = conv
        self.bn = norm
        self.act = act
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "keyword":
            return activate(self.bn(input=self.conv(x)), self.act)
        if self.style == "before":
            # The BatchNorm of its input: two modules that hold one value.
            return self.conv(activate(self.bn(x), self.act))
        if self.style == "scaled":
            y = self.bn(self.conv(x).mul_(0.5))
            y *= 1.5
            return activate(y.add_(0.1), self.act)
        return activate(self.bn(self.conv(x)), self.act)


class Residual(nn.Module):
    """``body(x) + shortcut(x)``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None, act: str, style: str) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.act = act
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        if self.style == "shortcut first" and self.shortcut is not None:
            identity = self.shortcut(x)
        y = self.body(x)
        if self.style != "shortcut first" and self.shortcut is not None:
            identity = self.shortcut(x)
        if self.style == "inplace":
            y += identity
        elif self.style == "add_":
            y = y.add_(identity)
        elif self.style == "reversed":
            y = torch.add(identity, y)
        elif self.style == "broadcast":
            y = y + identity.mean(-1, keepdim=True)
        else:
            y = y + identity
        return activate(y, self.act)


class Branches(nn.Module):
    """Several children of one input, from a list, a dictionary or attributes."""

    def __init__(self, children: list[nn.Module], container: str, how: str) -> None:
        super().__init__()
        self.how = how
        self.container = container
        self.num = len(children)
        if container == "list":
            self.parts = nn.ModuleList(children)
        elif container == "dict":
            self.parts = nn.ModuleDict({f"b{i}": child for i, child in enumerate(children)})
        else:
            for index, child in enumerate(children):
                setattr(self, f"branch{index}", child)

    def forward(self, x: Tensor) -> Tensor:
        if self.container == "list":
            return join([part(x) for part in self.parts], self.how)  # pyright: ignore
        if self.container == "dict":
            values = {name: part(x) for name, part in self.parts.items()}  # pyright: ignore
            return join([values[f"b{i}"] for i in range(self.num)], self.how)
        return join([getattr(self, f"branch{i}")(x) for i in range(self.num)], self.how)


class Views(nn.Module):
    """Two views of the input through one encoder in one forward."""

    def __init__(self, encoder: nn.Module, how: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        first = self.encoder(x)
        second = self.encoder(x.flip(1) * 0.7 + 0.1)
        return join([first, second], self.how)


class Functional(nn.Module):
    """An owner of functional sites, with buffers of its own."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: nn.Parameter | None

    def __init__(self, num_channels: int, spec: dict[str, Any]) -> None:
        super().__init__()
        tracked = torch.zeros(num_channels) if spec["track"] else None
        self.register_buffer("running_mean", tracked)
        self.register_buffer("running_var", None if tracked is None else tracked + 1)
        weight = nn.Parameter(torch.ones(num_channels)) if spec["affine"] != "none" else None
        self.register_parameter("weight", weight)
        self.momentum = spec["momentum"] or 0.1
        self.eps = spec["eps"]
        self.num_calls = 1 + spec["twice"]
        self.torch_call = spec["torch_call"]

    def forward(self, x: Tensor) -> Tensor:
        batch = self.training or self.running_mean is None
        stats = (self.running_mean, self.running_var)
        if self.torch_call:
            rest = (batch, self.momentum, self.eps, False)
            y = torch.batch_norm(x, self.weight, None, *stats, *rest)
        else:
            y = F.batch_norm(x, *stats, self.weight, None, batch, self.momentum, self.eps)
        if self.num_calls == 1:
            return y
        z = F.batch_norm(x * x, *stats, training=batch, momentum=self.momentum, eps=self.eps)
        return y + z


class Unused(nn.Module):
    """A site whose output nobody uses: its running statistics move all the same."""

    def __init__(self, norm: nn.Module, body: nn.Module, first: bool) -> None:
        super().__init__()
        self.bn = norm
        self.body = body
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.bn(x)
        y = self.body(x)
        if not self.first:
            self.bn(x)
        return y


class Pair(nn.Module):
    """Returns several values in a tuple or a dictionary."""

    def __init__(self, first: nn.Module, second: nn.Module, as_dict: bool) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.as_dict = as_dict

    def forward(self, x: Tensor) -> Any:
        if self.as_dict:
            return {"first": self.first(x), "second": (x, self.second(x))}
        return self.first(x), self.second(x)


class Unpack(nn.Module):
    """Uses what :class:`Pair` returns."""

    def __init__(self, pair: Pair, how: str) -> None:
        super().__init__()
        self.pair = pair
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.pair.as_dict:
            out = self.pair(x)
            return join([out["first"], out["second"][1]], self.how)
        first, second = self.pair(x)
        return join([first, second], self.how)


class Auxiliary(nn.Module):
    """Another graph in training than in evaluation."""

    def __init__(self, body: nn.Module, extra: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.body(x) + 0.5 * self.extra(x)
        return self.body(x)


class Teacher(nn.Module):
    """A branch without gradients, which fx cannot record."""

    def __init__(self, body: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.teacher = teacher

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return self.body(x) - target


class Untraceable(nn.Module):
    """Branches on its input: the original forward runs."""

    def __init__(self, norm: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.bn = norm
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        if bool((x != x).any()):
            raise ValueError("NaN")
        return self.body(self.bn(x))


class Reads(nn.Module):
    """Reads the running mean before and after the site that moves it."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.bn = norm

    def forward(self, x: Tensor) -> Tensor:
        assert self.bn.running_mean is not None
        before = self.bn.running_mean * 2
        y = self.bn(x)
        both = before - self.bn.running_mean
        return y + 0.1 * both.view(1, -1, *[1] * (x.dim() - 2))


class Late(nn.Module):
    """Changes in place what a site has read, which only works without gradients."""

    def __init__(self, conv: nn.Module, norm: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.bn = norm
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y = self.bn(h)
        z = h.mul_(0.5).relu_()
        return y + self.other(z)


class Chunks(nn.Module):
    """Two views of one tensor, one of which changes in place before a site reads it."""

    def __init__(self, conv: nn.Module, norm: nn.Module, other: nn.Module, style: str) -> None:
        super().__init__()
        self.conv = conv
        self.bn = norm
        self.other = other
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv(x).chunk(2, 1)
        if self.style == "operator":
            second *= 0.5
        elif self.style == "slice":
            second[:, :1].add_(1)
        else:
            second.mul_(0.5)
        return self.bn(first) + self.other(second)


class Counter(nn.Module):
    """Counts its calls in a buffer, which it reads before and after."""

    calls: Tensor

    def __init__(self, norm: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.bn = norm
        self.body = body
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        before = self.calls * 0.1
        y = self.body(self.bn(x) + before)
        self.calls.add_(1)
        return y + self.calls * 0.1


class Dense(nn.Module):
    """Every child reads all that came before it."""

    def __init__(self, children: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for part in self.parts:
            features.append(part(torch.cat(features, 1)))
        return torch.cat(features[1:], 1)


class Repeat(nn.Module):
    """One child several times, one after the other."""

    def __init__(self, body: nn.Module, num: int) -> None:
        super().__init__()
        self.body = body
        self.num = num

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.num):
            x = self.body(x)
        return x


class Optional(nn.Module):
    """A forward with an optional argument; the floor serves calls that give it."""

    def __init__(self, norm: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.bn = norm
        self.body = body

    def forward(self, x: Tensor, other: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        y = self.bn(x)
        if other is not None:
            y = y + other * scale
        return self.body(y)


class Caller(nn.Module):
    """Calls an :class:`Optional` in one of the ways it offers."""

    def __init__(self, target: Optional, style: str) -> None:
        super().__init__()
        self.target = target
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "keywords":
            return self.target(other=x.tanh(), x=x, scale=0.5)
        if self.style == "position":
            return self.target(x, x)
        return self.target(x, None)


class Method(nn.Module):
    """Sites called in a helper method, past the forward of the module in between."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def features(self, x: Tensor) -> Tensor:
        """What ``body`` does, child by child."""
        for part in self.body:
            x = part(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Switch(nn.Module):
    """Two ways that an attribute chooses between, which may change at any time."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.use_second = False

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) if self.use_second else self.first(x)


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook."""
    return output * 2


def shift_input(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """A forward pre-hook of a layer that is called with its input alone, by keyword or without."""
    shifted = {name: value + 0.25 for name, value in kwargs.items()}
    return tuple(value + 0.25 for value in args), shifted
