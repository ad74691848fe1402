"""A step that is broken off leaves nothing behind that could spoil the next one."""

import contextlib
import copy
import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnrewrite
from tests.models import ResidualNet, perturb
from tests.ranks import RankPool


class InterruptedStepError(Exception):
    """What the user's code raises."""


def _net() -> Any:
    torch.manual_seed(0)
    return perturb(ResidualNet().double())


def _x(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) * torch.sin(torch.arange(3.0))).square().sum()


def _interrupt(model: Any, x: Tensor, where: str) -> None:
    """A step that ends early on every rank, at the same place."""
    if where == "between":
        _loss(model, x)
        raise InterruptedStepError
    if where == "forward without backward":
        _loss(model, x)
        return
    handle: Any = None
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    conv = inner.layer2.conv2

    def stop(*_: object) -> None:
        if where.startswith("Ctrl-C"):
            os.kill(os.getpid(), signal.SIGINT)
            # The handler runs at one of the next byte codes.
            time.sleep(1)
        raise InterruptedStepError

    if where.endswith("in backward"):
        handle = conv.weight.register_hook(stop)
    else:
        handle = conv.register_forward_pre_hook(stop)
    try:
        _loss(model, x).backward()
    finally:
        handle.remove()


def _next_step(rank: int, world_size: int, where: str, wrap: str) -> dict[str, list[Tensor]]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = bnrewrite.convert(_net())
    run: Any = DistributedDataParallel(model) if wrap == "DDP" else model
    rows = slice(2 * rank, 2 * rank + 2)
    before = copy.deepcopy(model.state_dict())
    with contextlib.suppress(InterruptedStepError, KeyboardInterrupt):
        _interrupt(run, _x(0)[rows], where)
    # What the broken forward has counted differs with the place; the next step starts afresh.
    model.load_state_dict(before)
    model.zero_grad()
    if wrap == "DDP" and where.endswith("in backward"):
        # Its reducer waits for the rest of the broken backward, whatever the model.
        run = DistributedDataParallel(model)
    _loss(run, _x(1)[rows]).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if wrap != "DDP":
        for grad in grads:
            dist.all_reduce(grad)
            grad /= world_size
    return {"gradients": grads, "buffers": list(model.buffers())}


PLACES = (
    "between",
    "forward without backward",
    "exception in forward",
    "exception in backward",
    "Ctrl-C in forward",
    "Ctrl-C in backward",
)


@pytest.mark.parametrize("wrap", ["plain", "DDP"])
@pytest.mark.parametrize("where", PLACES)
def test_the_next_step_equals_one_process(ranks: RankPool, where: str, wrap: str) -> None:
    model = _net()
    _loss(model, _x(1)).backward()
    expected = [p.grad / 2 for p in model.parameters() if p.grad is not None]
    for result in ranks.run(_next_step, 2, where, wrap):
        for ours, theirs in zip(result["gradients"], expected, strict=True):
            # float64 sums in another order.
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
        for ours, theirs in zip(result["buffers"], model.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def _sizes_of_works(rank: int, world_size: int) -> int:
    """Collectives that were launched and that nobody waits for, after broken steps."""
    model = bnrewrite.convert(_net())
    for where in PLACES[:4]:
        try:
            _interrupt(model, _x(0)[2 * rank : 2 * rank + 2], where)
        except InterruptedStepError:
            continue
    return torch._C._distributed_c10d._get_work_registry_size()


def test_broken_steps_leave_no_collective_behind(ranks: RankPool) -> None:
    assert ranks.run(_sizes_of_works, 2) == [0, 0]
