"""Transforms of ``torch.func``, which know torch's BatchNorm only, and ``torch.jit.trace``."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import bnrewrite
from tests.models import Block, ResidualNet
from tests.ranks import RankPool

OF_TORCH = pytest.mark.filterwarnings("ignore:.*is deprecated.*")


def _net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4, **options), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(20, 2)).double()


OPTIONS = {
    "default": {},
    "momentum None": {"momentum": None},
    "not tracked": {"track_running_stats": False},
    "not affine": {"affine": False},
}


def _loss(model: nn.Module) -> Callable[..., Tensor]:
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, {**parameters, **buffers}, (x,)).square().sum()

    return loss


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_grad_is_that_of_autograd(options: dict[str, Any]) -> None:
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    plain = _net(**options)
    plain(x).square().sum().backward()
    model = bnrewrite.convert(_net(**options))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = grad(_loss(model))(parameters, x)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-12)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)


def _transformed(model: nn.Module, x: Tensor) -> list[Any]:
    bias = model.get_parameter("4.bias").detach()

    def loss(bias: Tensor, x: Tensor) -> Tensor:
        return functional_call(model, {"4.bias": bias}, (x,)).pow(3).sum()

    return [
        jvp(lambda x: loss(bias, x), (x,), (torch.ones_like(x),)),
        hessian(lambda x: loss(bias, x))(x),
        vmap(grad(loss), in_dims=(None, 0))(bias, torch.stack([x, 2 * x.roll(1, 0)])),
    ]


@OF_TORCH
@pytest.mark.parametrize("training", [True, False])
def test_other_transforms_are_those_of_the_plain_model(training: bool) -> None:
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    found = []
    for model in (
        _net(track_running_stats=False),
        bnrewrite.convert(_net(track_running_stats=False)),
    ):
        model.train(training)
        found.append(_transformed(model, x))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def _evaluates_in_a_group(rank: int, world_size: int) -> list[Any]:
    torch.manual_seed(0)
    model = _net(track_running_stats=True)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    return [_transformed(one.eval(), x) for one in (model, bnrewrite.convert(model))]


@OF_TORCH
def test_evaluation_can_be_transformed_where_there_is_a_group(ranks: RankPool) -> None:
    for plain, ours in ranks.run(_evaluates_in_a_group, 2):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_sites_in_one_round_are_batched_without_a_group() -> None:
    x = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64)
    plain = Block(3, 4, 2).double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    model = bnrewrite.convert(copy.deepcopy(plain))
    found, expected = (vmap(lambda x, m=m: functional_call(m, {}, (x,)))(x) for m in (model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_what_torch_refuses_is_refused() -> None:
    model = bnrewrite.convert(_net())
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="were not batched"):
        vmap(lambda x: functional_call(model, {}, (x,)))(x)
    torch.testing.assert_close(dict(model.state_dict()), state)


def _traced(rank: int, world_size: int, training: bool) -> list[list[Tensor]]:
    """Result, gradient and buffers of a traced module and of the module itself."""
    model = bnrewrite.convert(_net()).train(training)
    x, other = torch.randn(2, 6, 3, 5, dtype=torch.float64).requires_grad_()
    with warnings.catch_warnings():
        # That it is deprecated, and asks tensors for values.
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(model, (x,))
    found = []
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for run in (traced, model):
        model.load_state_dict(state)
        y = run(other)
        (gradient,) = torch.autograd.grad(y.square().sum(), other)
        found.append([y.detach(), gradient, *(b.clone() for b in model.buffers())])
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_traced_modules_compute_the_same(ranks: RankPool, training: bool, world_size: int) -> None:
    for traced, expected in ranks.run(_traced, world_size, training):
        torch.testing.assert_close(traced, expected, rtol=1e-12, atol=1e-12)


def test_layers_that_share_are_traced_one_by_one() -> None:
    """TorchScript takes no lists of tensors that may be missing."""
    plain = ResidualNet().double()
    model = bnrewrite.convert(copy.deepcopy(plain))
    assert any(len(one.sites) > 1 for one in bnrewrite.report(model).rounds)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(model, (x,), check_trace=False)
    # The trace was a step, too.
    plain(x)
    expected = plain(x)
    torch.testing.assert_close(traced(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)


def _refused(rank: int, world_size: int) -> list[str]:
    messages = []
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    for mode in ("sync", "shuffle"):
        model = bnrewrite.convert(_net(), mode)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        with pytest.raises(bnrewrite.UnsupportedBatchNorm) as caught:
            grad(_loss(model))(parameters, x)
        messages.append(str(caught.value))
        torch.testing.assert_close(dict(model.state_dict()), state)
    return messages


def _refused_together(rank: int, world_size: int) -> str:
    model = bnrewrite.convert(Block(3, 4, 2).double())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(bnrewrite.UnsupportedBatchNorm) as caught:
        grad(_loss(model))(parameters, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    return str(caught.value)


def test_sites_that_share_their_collectives_are_refused_by_name(ranks: RankPool) -> None:
    for message in ranks.run(_refused_together, 2):
        assert message.startswith("bn1: torch.func transforms do not support")


def test_what_communicates_is_refused_by_name(ranks: RankPool) -> None:
    for messages in ranks.run(_refused, 2):
        assert len(messages) == 2
        for message in messages:
            assert message.startswith("1: torch.func transforms do not support")
            assert "mode='local'" in message
