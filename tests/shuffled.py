"""Shuffled BatchNorm of all ranks simulated in one process, where autograd gives the gradient."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnrewrite
from bnrewrite import permutations, reference

Peers = Callable[[str, int], list[int]]
"""For the name of a site and a step: the peer of every rank."""


def ring(world_size: int) -> Peers:
    """Rank r borrows from rank r + 1."""
    return lambda site, step: [(rank + 1) % world_size for rank in range(world_size)]


def random_peers(world_size: int, seed: int = 0) -> Peers:
    """What the reference says about a random schedule."""

    def peers(site: str, step: int) -> list[int]:
        key = zlib.crc32(site.encode())
        counter = torch.tensor(step)
        return [
            int(permutations.shuffle_peers(counter, key, seed, rank, world_size)[0])
            for rank in range(world_size)
        ]

    return peers


def make_model() -> nn.Sequential:
    """Three sites one after the other, so that borrowed statistics feed borrowed statistics."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5, affine=False),
        nn.Tanh(),
        nn.Conv2d(5, 4, 1),
        nn.BatchNorm2d(4),
    ).double()
    for module in (model[0], model[5]):
        assert isinstance(module, nn.BatchNorm2d)
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.uniform_(module.bias)
    return model


def make_input(rank: int, num_samples: int, step: int = 0) -> Tensor:
    """A batch of another mean and scale on every rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(num_samples, 3, 4, 3, dtype=torch.float64, generator=generator)
    return (x * (1 + 0.3 * rank) + rank - 1).requires_grad_()


def loss_of(y: Tensor) -> Tensor:
    """A loss whose gradient differs from value to value."""
    return (y * torch.sin(1.3 * y + 1)).sum()


def simulate(
    model: nn.Sequential,
    xs: list[Tensor],
    peers: Peers,
    *,
    step: int = 0,
    detach: bool = False,
    follow_group: bool = False,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Outputs of every rank, and the running statistics that every rank should hold after.

    ``model`` is not changed; its buffers are those that all ranks start from.
    """
    values = list(xs)
    buffers: list[dict[str, Tensor]] = [{} for _ in xs]
    for name, module in model.named_children():
        if not isinstance(module, _BatchNorm):
            values = [module(value) for value in values]
            continue
        values = _site(module, name, values, peers(name, step), buffers, detach, follow_group)
    return values, buffers


def borrow(value: Tensor, lender: Tensor, eps: float) -> Tensor:
    """``value``, normalized with the statistics of ``lender``."""
    var, mean = torch.var_mean(lender, reference.reduced_dims(lender), correction=0)
    rstd = reference.per_channel((var + eps).rsqrt(), value)
    return (value - reference.per_channel(mean, value)) * rstd


def _site(
    bn: _BatchNorm,
    name: str,
    values: list[Tensor],
    peer_of: list[int],
    buffers: list[dict[str, Tensor]],
    detach: bool,
    follow_group: bool,
) -> list[Tensor]:
    outputs = []
    for rank, value in enumerate(values):
        lender = values[peer_of[rank]]
        # A rank whose peer holds nothing uses its own statistics.
        lender = lender if lender.numel() else value
        lender = lender.detach() if detach else lender
        followed = torch.cat(values) if follow_group else lender
        if value.numel():
            y = borrow(value, lender, bn.eps)
            if bn.affine:
                y = y * reference.per_channel(bn.weight, y) + reference.per_channel(bn.bias, y)
        else:
            y = value
        outputs.append(y)
        if followed.numel():
            var, mean = torch.var_mean(followed, reference.reduced_dims(followed), correction=1)
            assert bn.running_mean is not None
            assert bn.running_var is not None
            assert bn.momentum is not None
            buffers[rank][f"{name}.running_mean"] = bn.running_mean.lerp(mean, bn.momentum).detach()
            buffers[rank][f"{name}.running_var"] = bn.running_var.lerp(var, bn.momentum).detach()
    return outputs


def converted_step(
    rank: int, world_size: int, mode: bnrewrite.Shuffle | str, sizes: list[int], num_steps: int = 1
) -> dict[str, dict[str, Tensor]]:
    """Output, gradients and buffers of one rank after ``num_steps`` forwards and one backward."""
    model = bnrewrite.convert(make_model(), mode)
    for step in range(num_steps - 1):
        model(make_input(rank, sizes[rank], step))
    x = make_input(rank, sizes[rank], num_steps - 1)
    y = model(x)
    loss_of(y).backward()
    assert x.grad is not None
    return {
        "values": {"y": y.detach(), "x.grad": x.grad},
        "grads": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "buffers": dict(model.named_buffers()),
    }


def assert_close(
    ours: Tensor, theirs: Tensor, rtol: float = 1e-9, what: str = "", scale: float = 0.0
) -> None:
    """Agreement relative to the largest entry, or to ``scale`` if that is larger.

    By default to the digits of float64, since sums are taken in another order.
    """
    assert ours.shape == theirs.shape
    if theirs.numel():
        error = (ours - theirs).abs().max().item()
        largest = max(theirs.abs().max().item(), scale)
        assert error <= rtol * largest, f"{what}: off by {error:.2e}, scale {largest:.2e}"
