"""Gradients of gradients across ranks: a penalty as of WGAN-GP against one process, in float64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bnrewrite
from tests.models import ResidualNet, perturb
from tests.ranks import RankPool


def _critic() -> nn.Module:
    """Smooth, with a residual connection, sites that share a collective and one without weights."""
    torch.manual_seed(3)
    model: Any = ResidualNet(width=3)
    model.layer1.bn2 = nn.BatchNorm2d(3, affine=False)
    return perturb(model.double())


def _x() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x + torch.randn(6, 3, 1, 1, generator=generator, dtype=torch.float64)


def _penalize(critic: Any, x: Tensor) -> Tensor:
    """The mean score and a penalty on its gradient, summed over the samples of the rank."""
    x = x.clone().requires_grad_()
    score = critic(x).tanh()
    (grad,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    penalty = (grad.flatten(1).norm(dim=1) - 1).square().sum()
    loss = score.sum() + 10 * penalty
    loss.backward()
    assert x.grad is not None
    return x.grad


def _rank(rank: int, world_size: int, sizes: list[int], passes: Any) -> dict[str, Any]:
    critic = bnrewrite.convert(_critic(), passes=passes)
    start = sum(sizes[:rank])
    grad = _penalize(critic, _x()[start : start + sizes[rank]])
    grads = {}
    for name, parameter in critic.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        grads[name] = parameter.grad
    return {"input": grad, "parameters": grads, "buffers": list(critic.buffers())}


@pytest.mark.parametrize("passes", [(), None], ids=["no passes", "all passes"])
@pytest.mark.parametrize("sizes", [[3, 3], [1, 5], [4, 0, 2]], ids=str)
def test_a_gradient_penalty_equals_one_process(
    ranks: RankPool, sizes: list[int], passes: Any
) -> None:
    critic = _critic()
    expected = _penalize(critic, _x())
    start = 0
    for size, result in zip(sizes, ranks.run(_rank, len(sizes), sizes, passes), strict=True):
        _assert_close(result["input"], expected[start : start + size])
        for name, parameter in critic.named_parameters():
            assert parameter.grad is not None
            _assert_close(result["parameters"][name], parameter.grad)
        for ours, theirs in zip(result["buffers"], critic.buffers(), strict=True):
            _assert_close(ours, theirs)
        start += size


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    # float64 sums in another order; second derivatives amplify it by 1 / std a few times.
    scale = theirs.abs().max().item() if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8 * max(scale, 1e-2))


def _compiled(rank: int, world_size: int) -> str:
    critic: Any = torch.compile(bnrewrite.convert(_critic()), backend="aot_eager", fullgraph=True)
    try:
        _penalize(critic, _x()[3 * rank : 3 * rank + 3])
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_compiled_it_says_no(ranks: RankPool) -> None:
    """AOTAutograd has no second derivatives, of any model; it raises before anything is wrong."""
    for message in ranks.run(_compiled, 2):
        assert "double backward" in message


def _batched(rank: int, world_size: int) -> list[Tensor]:
    """The largest differences between gradients in one go and one by one, of each input."""
    torch.manual_seed(rank)
    found = []
    modes: list[dict[str, Any]] = [
        {"passes": ()},
        {},
        {"mode": bnrewrite.Shuffle()},
        {"mode": bnrewrite.Shuffle(schedule="random")},
    ]
    for options in modes:
        model = bnrewrite.convert(ResidualNet(width=3), **options).double()
        x = torch.randn(3, 3, 6, 6, dtype=torch.float64).requires_grad_()
        y = model(x)
        grads = torch.randn(2, *y.shape, dtype=torch.float64)
        (both,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
        alone = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads]
        found.append((both - torch.stack(alone)).abs().max())
    return found


# Of torch, about what it has no batching rule for.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients_of_ranks(ranks: RankPool) -> None:
    for differences in ranks.run(_batched, 2):
        for difference in differences:
            assert difference.item() < 1e-12
