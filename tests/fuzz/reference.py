"""What a random network on several ranks must do, computed in one process.

The unconverted network runs on the batches of all ranks, one after the other in one tensor. Nothing
in it mixes samples but BatchNorm, and that is intercepted: for every set of ranks that shares
statistics it calls torch's own ``F.batch_norm`` on their samples.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

import bnrewrite
from bnrewrite.modes import Mode
from bnrewrite.sites.intercept import FUNCTIONS, functional_arguments
from tests.fuzz.layers import Functional
from tests.fuzz.norms import OwnForwardNorm
from tests.shuffled import borrow, random_peers


class Fresh(torch.autograd.Function):
    """A contiguous copy, with a contiguous gradient.

    The backward of torch's own BatchNorm on the CPU is wrong where a spatial size is 1 and the
    strides of the gradient suggest another layout than those of the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone(memory_format=torch.contiguous_format)


def batch_norm(x: Tensor, *args: Any) -> Tensor:
    """``F.batch_norm`` in a layout in which torch has it right."""
    return fresh(F.batch_norm(fresh(x), *args))


def fresh(x: Tensor) -> Tensor:
    """See :class:`Fresh`."""
    result = Fresh.apply(x)
    assert isinstance(result, Tensor)
    return result


class Plain(TorchFunctionMode):
    """Runs a network with torch's own BatchNorm on the samples of all ranks."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in FUNCTIONS:
            return func(*args, **kwargs)
        x, mean, var, weight, bias, *rest = functional_arguments(func, args, kwargs)
        return batch_norm(x, mean, var, weight, bias, *rest)


@dataclasses.dataclass
class World:
    """Who shares statistics with whom.

    Attributes:
        groups: ranks of each process group; every rank is in one.
        modes: of every site by qualified name; None stays as it is, which is local.
        sizes: samples of each rank in this step.
    """

    groups: list[list[int]]
    modes: dict[str, Mode | None]
    sizes: list[int]


@dataclasses.dataclass
class _Buffers:
    mean: Tensor | None
    var: Tensor | None
    count: Tensor | None


class Reference(TorchFunctionMode):
    """Runs a network on the samples of all ranks; ``buffers`` are those of every rank."""

    def __init__(self, net: nn.Module, world: World) -> None:
        super().__init__()
        self.net = net
        self.world = world
        self.names = {module: name for name, module in net.named_modules()}
        self._stack: list[nn.Module] = []
        self._num_calls = 0
        self._buffers: dict[nn.Module, list[_Buffers]] = {}
        for module in net.modules():
            if isinstance(module, (_BatchNorm, Functional)):
                copies = [_copy(module) for group in world.groups for _ in group]
                self._buffers[module] = copies

    def buffers(self, rank: int) -> dict[str, Tensor]:
        """Buffers of all sites on one rank, by qualified name."""
        names = ("running_mean", "running_var", "num_batches_tracked")
        return {
            f"{self.names[module]}.{name}".lstrip("."): tensor
            for module, copies in self._buffers.items()
            for name, tensor in zip(names, vars(copies[rank]).values(), strict=True)
            if tensor is not None
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Knows, inside, whose forward is running."""
        handles = []
        for module in self.names:
            handles += [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave),
            ]
        try:
            with self:
                yield
        finally:
            self._stack.clear()
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)
        self._num_calls = 0

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in FUNCTIONS or self._stack[-1] not in self._buffers:
            return func(*args, **kwargs)
        values = functional_arguments(func, args, kwargs)
        return self._evaluate(self._stack[-1], *values)

    def _evaluate(
        self,
        site: nn.Module,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        name = self.names[site]
        if isinstance(site, Functional):
            name = f"{name}.batch_norm" + (f"_{self._num_calls}" if self._num_calls else "")
            name = name.lstrip(".")
            self._num_calls += 1
        call = _Call(self, site, name, site.training, mean is not None, batch, momentum, eps)
        chunks = list(x.split(self.world.sizes))
        return torch.cat(
            [
                y if not y.numel() else batch_norm(y, *identity(y, weight, bias), False, 0.0, 0.0)
                for y in call.normalized(chunks)
            ]
        )


def identity(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """Statistics that change nothing, so that only weight and bias act."""
    return y.new_zeros(y.size(1)), y.new_ones(y.size(1)), weight, bias


def _copy(module: nn.Module) -> _Buffers:
    tensors = [
        getattr(module, name, None)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    ]
    return _Buffers(*(None if tensor is None else tensor.clone() for tensor in tensors))


@dataclasses.dataclass
class _Call:
    """One evaluation of a site on all ranks."""

    reference: Reference
    site: Any
    name: str
    training: bool
    has_stats: bool
    batch: bool
    momentum: float
    eps: float

    def normalized(self, chunks: list[Tensor]) -> list[Tensor]:
        """The samples of every rank, normalized, before weight and bias."""
        mode = self.reference.world.modes[self.name]
        buffers = self.reference._buffers[self.site]
        if isinstance(mode, bnrewrite.Frozen) or not self.batch:
            return [
                batch_norm(x, own.mean, own.var, None, None, False, 0.0, self.eps)
                for x, own in zip(chunks, buffers, strict=True)
            ]
        results = list(chunks)
        for group in self.reference.world.groups:
            if isinstance(mode, bnrewrite.Shuffle) and self.training and len(group) > 1:
                self._shuffle(mode, group, chunks, results)
                continue
            shares = isinstance(mode, bnrewrite.Sync) and self.training
            for ranks in [group] if shares else [[rank] for rank in group]:
                values = torch.cat([chunks[rank] for rank in ranks])
                if values.numel():
                    y = batch_norm(values, None, None, None, None, True, 0.0, self.eps)
                    sizes = [chunks[rank].size(0) for rank in ranks]
                    for rank, part in zip(ranks, y.split(sizes), strict=True):
                        results[rank] = part
                for rank in ranks:
                    self._move(buffers[rank], values)
        return results

    def _shuffle(
        self, mode: Any, group: list[int], chunks: list[Tensor], results: list[Tensor]
    ) -> None:
        buffers = self.reference._buffers[self.site]
        size = len(group)
        peers = [(place + 1) % size for place in range(size)]
        if mode.schedule == "random":
            count = buffers[group[0]].count
            assert count is not None
            peers = random_peers(size, mode.seed)(self.name, int(count))
        everyone = torch.cat([chunks[rank] for rank in group])
        for place, rank in enumerate(group):
            lender = chunks[group[peers[place]]]
            # A rank whose peer holds nothing uses its own statistics.
            lender = lender if lender.numel() else chunks[rank]
            if chunks[rank].numel():
                detached = lender.detach() if mode.backward == "detach" else lender
                results[rank] = borrow(chunks[rank], detached, self.eps)
            follows = everyone if mode.running == "group" else lender
            if mode.schedule == "random" and not lender.numel():
                # All statistics are at hand, so an empty rank with an empty peer has some too.
                follows = everyone
            self._move(buffers[rank], follows)

    def _move(self, own: _Buffers, values: Tensor) -> None:
        """Moves the running statistics of one rank towards those of ``values``."""
        if not self.has_stats:
            return
        momentum = self.momentum
        if own.count is not None:
            if values.numel() or isinstance(self.site, OwnForwardNorm):
                own.count.add_(1)
            if self.site.momentum is None:
                momentum = 1 / max(int(own.count), 1)
        if values.numel():
            with torch.no_grad():
                F.batch_norm(values, own.mean, own.var, None, None, True, momentum, self.eps)
