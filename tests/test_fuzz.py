"""A bounded run of the fuzzer, and what longer ones have found, by name.

``python -m tests.fuzz --examples N --seed S`` runs as long as you like.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnrewrite
from tests.fuzz.norms import OwnForwardNorm
from tests.fuzz.run import fuzz
from tests.ranks import RankPool


def test_random_networks_on_ranks_are_one_process(ranks: RankPool) -> None:
    counts: Counter[str] = Counter()
    fuzz(ranks, 150, counts=counts)
    compared = sum(num for what, num in counts.items() if what.endswith("ranks"))
    assert compared >= 100, counts
    assert counts["with shared collectives"] >= 20, counts


def test_a_batch_norm_left_alone_by_patterns_is_no_owner() -> None:
    """Its forward cannot be traced, and a warning said that its call uses local statistics."""
    model = nn.Sequential(OwnForwardNorm(3), nn.BatchNorm1d(3))
    bnrewrite.convert(model, {"1": "sync"})
    skips = bnrewrite.report(model).skipped
    assert [(skip.name, skip.reason) for skip in skips] == [("0", "no pattern in mode matches it")]


class _Changed(nn.Module):
    """Changes in place what an activation returns, of which torch keeps the argument."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(x)).mul_(1.5)


def _train_changed(rank: int, world_size: int, name: str) -> list[Tensor]:
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(4, 3)[rank::world_size]
    x = x.clone().requires_grad_()
    model = _Changed(_ACTIVATIONS[name]).double()
    y = bnrewrite.convert(model)(x) if world_size > 1 else model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": functools.partial(F.leaky_relu, negative_slope=0.1),
    "leaky module": nn.LeakyReLU(0.1),
    "relu6": F.relu6,
    "silu": F.silu,
}


@pytest.mark.parametrize("name", _ACTIVATIONS)
def test_the_result_of_an_activation_may_change_in_place(name: str, ranks: RankPool) -> None:
    """The fused site kept it for the backward, which raised."""
    expected = _train_changed(0, 1, name)
    for ours, theirs in zip(
        zip(*ranks.run(_train_changed, 2, name), strict=True), expected, strict=True
    ):
        joined = torch.stack(ours, 1).view_as(theirs)
        # Sums of four values in another order.
        assert (joined - theirs).abs().max() < 1e-12
    model = bnrewrite.convert(_Changed(_ACTIVATIONS[name]))
    model(torch.randn(4, 3)).sum().backward()


def _layouts(values: Tensor) -> Iterator[Tensor]:
    """``values`` with every order of dimensions in memory and odd strides of dimensions of one."""
    dims = range(values.dim())
    for order in itertools.permutations(dims):
        laid = values.permute(order).contiguous().permute([order.index(dim) for dim in dims])
        yield laid
        for stride in (1, 3):
            strides = [stride if laid.size(dim) == 1 else laid.stride(dim) for dim in dims]
            yield laid.as_strided(laid.shape, strides)


@pytest.mark.parametrize("shape", [(4, 2, 1, 2), (4, 2, 2, 1), (1, 3, 2, 2), (3, 1, 2, 1)], ids=str)
def test_layouts_in_which_torch_computes_a_wrong_gradient(shape: tuple[int, ...]) -> None:
    """On the CPU torch's own backward errs for 264 of 5,184 pairs of each shape but the last."""
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    weight = torch.rand(shape[1], dtype=torch.float64)

    def gradient(x: Tensor, grad: Tensor, ours: bool) -> Tensor:
        x = x.detach().requires_grad_()
        if ours:
            site = torch.ops.bnrewrite.batch_norm
            y = site(x, weight, None, None, None, None, True, True, 0.1, 1e-5, "")
        else:
            y = F.batch_norm(x, None, None, weight, None, True)
        return torch.autograd.grad(y, x, grad)[0]

    expected = gradient(x, grad, ours=False)
    for laid in _layouts(x):
        for laid_grad in _layouts(grad):
            # Sums of 8 values in another order.
            assert (gradient(laid, laid_grad, ours=True) - expected).abs().max() < 1e-12
