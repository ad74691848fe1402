"""The same kinds of trouble on two ranks: equal to one process with the global batch."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

import bnrewrite
from tests.cases import CASES, Case
from tests.models import ResidualNet, perturb
from tests.parity import seed, tensors, to_double
from tests.ranks import RankPool

SPLITTING = [case for case in CASES if case.splits]
BATCHES = (2, 4)
"""Samples of each rank."""


def _train(case_name: str, rows: slice | None) -> tuple[list, list, list]:
    """Outputs, gradients and buffers of two steps with some rows of the global batch."""
    case = next(case for case in CASES if case.name == case_name)
    seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = case.model().double()
        if rows is not None:
            model = bnrewrite.convert(model)
    outputs, grads = [], []
    for step in range(2):
        seed(step)
        args, kwargs = to_double(case.arguments(sum(BATCHES)))
        if rows is not None:
            args, kwargs = tree_map(
                lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, (args, kwargs)
            )
        seed(step)
        out, grad = _step(model, args, kwargs, rows)
        outputs.append(out)
        grads.append(grad)
    return outputs, grads, [buffer.clone() for buffer in model.buffers()]


def _step(
    model: nn.Module, args: Any, kwargs: Any, rows: slice | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """One forward and backward of a loss that is a sum over samples of weighted outputs."""
    model.zero_grad()
    outputs = [out for out in tensors(model(*args, **kwargs)) if out.is_floating_point()]
    start = 0 if rows is None else rows.start
    losses = []
    for out in outputs:
        if out.requires_grad:
            index = torch.arange(out[0].numel()).to(out)
            sample = torch.arange(start, start + out.size(0)).to(out)
            weight = torch.sin(index + 3 * sample.unsqueeze(1)).view_as(out)
            losses.append((out * weight).sum())
    torch.stack(losses).sum().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [out.detach() for out in outputs], grads


def _train_rank(rank: int, world_size: int, case_name: str) -> tuple[list, list, list]:
    start = sum(BATCHES[:rank])
    return _train(case_name, slice(start, start + BATCHES[rank]))


@pytest.mark.parametrize("case", SPLITTING, ids=lambda case: case.name)
def test_two_ranks_train_like_one_process_with_the_global_batch(
    case: Case, ranks: RankPool
) -> None:
    outputs, grads, buffers = _train(case.name, None)
    results = ranks.run(_train_rank, 2, case.name)
    for step in range(2):
        for index, expected in enumerate(outputs[step]):
            joined = torch.cat([result[0][step][index] for result in results])
            _assert_close(joined, expected, f"output {index}, step {step}")
        largest = max(grad.abs().max() for grad in grads[step] if grad is not None)
        for index, expected in enumerate(grads[step]):
            parts = [result[1][step][index] for result in results]
            assert all((part is None) == (expected is None) for part in parts)
            if expected is not None:
                _assert_close(sum(parts), expected, f"gradient {index}, step {step}", largest)
    for result in results:
        for index, expected in enumerate(buffers):
            _assert_close(result[2][index].double(), expected.double(), f"buffer {index}")


def _assert_close(ours: Any, expected: Tensor, what: str, scale: Any = None) -> None:
    """float64 sums in another order: 1e-16 a layer, amplified by rstd; 1e-9 is far above."""
    if expected.numel():
        error = (ours - expected).abs().max()
        scale = expected.abs().max() if scale is None else scale
        assert error <= 1e-9 * max(float(scale), 1e-4), (what, float(error), float(scale))


def _sharded(rank: int, world_size: int, order: str) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(3)
    model = perturb(ResidualNet().double())
    if order == "convert first":
        bnrewrite.convert(model)
    for block in (model.get_submodule("layer1"), model.get_submodule("layer2")):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if order == "shard first":
        bnrewrite.convert(model)
    torch.manual_seed(4)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)[rank * 3 : rank * 3 + 3]
    out = model(x)
    (out * torch.sin(torch.arange(9.0)).view(3, 3).double() * (rank + 1)).sum().backward()
    grads = []
    for parameter in model.parameters():
        assert isinstance(parameter.grad, DTensor)
        grads.append(parameter.grad.full_tensor() * world_size)
    return [out.detach(), *grads]


@pytest.mark.parametrize("order", ["convert first", "shard first"])
def test_fully_sharded_blocks_train_like_one_process(order: str, ranks: RankPool) -> None:
    torch.manual_seed(3)
    model = perturb(ResidualNet().double())
    torch.manual_seed(4)
    out = model(torch.randn(6, 3, 8, 8, dtype=torch.float64))
    weight = torch.sin(torch.arange(9.0)).view(3, 3).double()
    (out * torch.cat([weight, 2 * weight])).sum().backward()
    results = ranks.run(_sharded, 2, order)
    _assert_close(torch.cat([result[0] for result in results]), out.detach(), "output")
    for result in results:
        for ours, parameter in zip(result[1:], model.parameters(), strict=True):
            assert parameter.grad is not None
            _assert_close(ours, parameter.grad, "gradient")
