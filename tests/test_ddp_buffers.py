"""DDP broadcasts no buffers that all ranks update alike, and still those that they do not."""

import contextlib
import copy
import itertools
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnrewrite
from bnrewrite.errors import BnRewriteError
from bnrewrite.sites.ddp_buffers import DDPBuffers
from bnrewrite.sites.undo import all_or_nothing
from tests.models import FunctionalNorm, ResidualNet, perturb
from tests.ranks import CountCollectives, RankPool


class WithBuffer(ResidualNet):
    """A buffer of the user's own, which DDP must go on broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mine", torch.zeros(3))


def _net(kind: type[nn.Module] = ResidualNet) -> Any:
    torch.manual_seed(0)
    return perturb(kind())


def _num_broadcasts(ddp: nn.Module) -> int:
    """Broadcasts of one forward."""
    with CountCollectives() as comm:
        ddp(torch.randn(2, 3, 8, 8)).sum().backward()
    return sum("broadcast" in name for name, _, _ in comm.seen)


def _broadcasts(ddp: nn.Module) -> tuple[bool, bool]:
    """Whether the first forward broadcasts, and a later one."""
    first = _num_broadcasts(ddp)
    # The second one may, since DDP rebuilds its buckets there.
    _num_broadcasts(ddp)
    return first > 0, _num_broadcasts(ddp) > 0


def _steps(rank: int, world_size: int, mode: Any) -> dict[str, Any]:
    model = bnrewrite.convert(_net(), mode)
    ddp = DistributedDataParallel(model)
    # A rank that has loaded another checkpoint than rank 0 is corrected by the first forward.
    for buffer in model.buffers():
        buffer.add_(rank)
    keys = list(model.state_dict())
    first, later = _broadcasts(ddp)
    assert list(model.state_dict()) == keys
    pickle.loads(pickle.dumps(copy.deepcopy(model)))
    return {
        "broadcasts": (first, later),
        "left": sorted(ddp.named_module_buffers),
        "buffers": dict(model.named_buffers()),
    }


SHUFFLE_GROUP = bnrewrite.Shuffle(running="group")


@pytest.mark.parametrize("mode", ["sync", SHUFFLE_GROUP], ids=str)
def test_buffers_of_all_ranks_are_broadcast_once_and_stay_equal(
    ranks: RankPool, mode: object
) -> None:
    one, two = ranks.run(_steps, 2, mode)
    for result in (one, two):
        assert result["broadcasts"] == (True, False)
        assert result["left"] == []
    for name, buffer in one["buffers"].items():
        assert torch.equal(buffer, two["buffers"][name]), name


@pytest.mark.parametrize("mode", ["local", "frozen", "shuffle"])
def test_buffers_that_ranks_update_by_themselves_stay_in_the_broadcast(
    ranks: RankPool, mode: str
) -> None:
    for result in ranks.run(_steps, 2, mode):
        assert result["broadcasts"] == (True, True)
        assert len(result["left"]) == 3 * ResidualNet.NUM_SITES


def test_with_mixed_modes_only_synchronized_sites_leave(ranks: RankPool) -> None:
    for result in ranks.run(_steps, 2, {"layer1.*": "local", "*": "sync"}):
        assert result["broadcasts"] == (True, True)
        assert {name.rpartition(".")[0] for name in result["left"]} == {"layer1.bn1", "layer1.bn2"}


def _others(rank: int, world_size: int) -> dict[str, list[str]]:
    """What stays in the broadcast, in other situations."""
    left = {}
    halves: list[Any] = [dist.new_group([0, 1]), dist.new_group([2, 3])]

    def note(what: str, model: nn.Module, **kwargs: Any) -> DistributedDataParallel:
        ddp = DistributedDataParallel(model, **kwargs)
        for _ in range(2):
            ddp(torch.randn(2, 3, 8, 8)).sum().backward()
        left[what] = sorted({name.rpartition(".")[0] for name in ddp.named_module_buffers})
        return ddp

    group = halves[rank // 2]
    note("sub-groups", bnrewrite.convert(_net(), process_group=group))
    note(
        "DDP in the sub-group", bnrewrite.convert(_net(), process_group=group), process_group=group
    )
    note("DDP in another group", bnrewrite.convert(_net()), process_group=group)
    note("a buffer of the user", bnrewrite.convert(_net(WithBuffer)))
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), FunctionalNorm(4), nn.Flatten())
    note("an own forward", bnrewrite.convert(nn.Sequential(*layers)))
    ignored = bnrewrite.convert(_net())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignored, ["bn.running_var"])
    ddp = note("ignored by the user", ignored)
    assert "bn.running_var" in ddp.parameters_to_ignore
    bnrewrite.revert(ignored)
    left["reverted"] = sorted({n.rpartition(".")[0] for n in ddp.named_module_buffers})
    assert ddp.parameters_to_ignore == {"bn.running_var"}
    checked = bnrewrite.convert(_net())
    bnrewrite.check(checked)
    note("checked by hand before", checked)
    note("wrapped again", checked)
    part = _net()
    note("another mode", bnrewrite.convert(part))
    bnrewrite.convert(part, {"bn": "local", "*": "sync"})
    note("converted again", part)
    return left


def test_what_stays_in_the_broadcast(ranks: RankPool) -> None:
    sites = [
        *("bn", "head.1", "layer1.bn1", "layer1.bn2", "layer2.bn1", "layer2.bn2"),
        "layer2.downsample.1",
    ]
    for left in ranks.run(_others, 4):
        assert sorted(left["sub-groups"]) == sorted(left["reverted"])
        assert len(left["sub-groups"]) == len(sites)
        assert left["DDP in the sub-group"] == []
        assert len(left["DDP in another group"]) == len(sites)
        assert left["a buffer of the user"] == [""]
        assert left["an own forward"] == ["2"]
        assert left["ignored by the user"] == []
        assert left["checked by hand before"] == []
        assert left["wrapped again"] == []
        assert left["another mode"] == []
        assert left["converted again"] == ["bn"]


def _compiled(rank: int, world_size: int, how: str) -> tuple[list[int], list[str]]:
    """At which steps DDP broadcasts buffers; a dispatch mode that counts would stop compilers."""
    torch._dynamo.reset()
    model = bnrewrite.convert(_net())
    if how == "inside":
        model.compile(backend="eager", fullgraph=True)
    ddp = DistributedDataParallel(model)
    run = torch.compile(ddp, backend="eager") if how == "around" else ddp
    steps = []
    for step in range(3):
        with pytest.MonkeyPatch.context() as patch:
            broadcast = ddp._sync_buffers
            patch.setattr(ddp, "_sync_buffers", lambda: (steps.append(step), broadcast()))  # noqa: B023
            run(torch.randn(2, 3, 8, 8)).sum().backward()
    return steps, sorted(ddp.named_module_buffers)


@pytest.mark.parametrize("how", ["inside", "around"])
def test_compiled_models_leave_the_broadcast_too(ranks: RankPool, how: str) -> None:
    assert ranks.run(_compiled, 2, how) == [([0], [])] * 2


def _trained(rank: int, world_size: int, check: str) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BNREWRITE_CHECK", check)
        model = bnrewrite.convert(_net().double())
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        torch.manual_seed(rank)
        for _ in range(4):
            optimizer.zero_grad()
            ddp(torch.randn(2, 3, 8, 8).double()).square().sum().backward()
            optimizer.step()
        assert (ddp.modules_buffers == []) == (check == "1")
        return [tensor.detach() for tensor in model.state_dict().values()]


def test_training_is_bit_equal_with_and_without_the_broadcast(ranks: RankPool) -> None:
    """The environment that switches agreement off leaves the broadcast to DDP."""
    results = [*ranks.run(_trained, 2, "1"), *ranks.run(_trained, 2, "0")]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _told(ddp: Any) -> tuple[Any, ...]:
    """What a DDP instance was told about its model, and the classes of that."""
    return (
        set(ddp.parameters_to_ignore),
        sorted(ddp.named_module_buffers),
        len(ddp.modules_buffers),
        list(ddp._forward_pre_hooks.items()),
        [type(module) for module in ddp.module.modules()],
    )


def _trained_by_ddp() -> DistributedDataParallel:
    ddp = DistributedDataParallel(bnrewrite.convert(_net()))
    for _ in range(2):
        ddp(torch.randn(2, 3, 8, 8)).sum().backward()
    return ddp


def _fails(rank: int, world_size: int, failing: tuple[int, ...]) -> list[Tensor]:
    ddp = _trained_by_ddp()
    before = _told(ddp)
    assert before[0]
    if rank in failing:
        with pytest.raises(ValueError, match="nope"):
            bnrewrite.convert(ddp.module, {"nope": "sync"})
        bn: Any = ddp.module.bn
        converted = type(bn)
        # As fully_shard does it.
        bn.__class__ = type("FSDPBatchNorm2d", (converted,), {})
        with pytest.raises(BnRewriteError, match="changed after conversion"):
            bnrewrite.revert(ddp.module)
        bn.__class__ = converted
    assert _told(ddp) == before
    for _ in range(2):
        ddp(torch.randn(2, 3, 8, 8)).sum().backward()
    assert _told(ddp) == before
    return list(ddp.module.buffers())


@pytest.mark.parametrize("failing", [(0,), (0, 1)], ids=["on one rank", "on all ranks"])
def test_a_conversion_that_fails_leaves_the_broadcast_alone(
    ranks: RankPool, failing: tuple[int, ...]
) -> None:
    one, two = ranks.run(_fails, 2, failing)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@contextlib.contextmanager
def _interrupted(number: int, codes: tuple[CodeType, ...]) -> Iterator[None]:
    """Ctrl-C before line ``number``, counted from 1, of all that run of ``codes``."""
    numbers = itertools.count(1)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code not in codes:
            return None
        if event == "line" and next(numbers) == number:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _breaks_off(rank: int, world_size: int) -> int:
    ddp = _trained_by_ddp()
    before = _told(ddp)
    codes = (DDPBuffers.put_back.__code__, all_or_nothing.__wrapped__.__code__)  # pyright: ignore
    number, broken_off = 0, True
    while broken_off:
        number, broken_off = number + 1, False
        try:
            with _interrupted(number, codes):
                bnrewrite.revert(ddp.module)
        except KeyboardInterrupt:
            broken_off = True
            assert _told(ddp) == before
    ignored, left, _, hooks, classes = _told(ddp)
    assert not ignored
    assert len(left) == 3 * ResidualNet.NUM_SITES
    assert len(hooks) == len(before[3]) - 1
    assert classes == [type(module) for module in _net().modules()]
    return number


def test_a_revert_that_is_broken_off_leaves_the_broadcast_alone(ranks: RankPool) -> None:
    for num_lines in ranks.run(_breaks_off, 2):
        assert num_lines > 10


def _in_threads(rank: int, world_size: int) -> list[list[Tensor]]:
    groups: Any = [dist.new_group() for _ in range(2)]
    nets = [bnrewrite.convert(_net(), process_group=group) for group in groups]
    # In the midst of both forwards the class of DDP knows the instance of one of the threads.
    meeting = threading.Barrier(2, timeout=60)

    def meet(*_: Any) -> None:
        meeting.wait()

    for net in nets:
        net.conv.register_forward_hook(meet)
    failed: list[BaseException] = []

    def train(net: Any, group: Any, delay_s: float) -> None:
        try:
            ddp = DistributedDataParallel(net, process_group=group)
            for step in range(4):
                x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step + rank))
                time.sleep(delay_s)
                ddp(x).square().sum().backward()
        except BaseException as error:
            failed.append(error)
            meeting.abort()

    # The threads of another rank come in another order.
    delays = (0.02, 0.0) if rank else (0.0, 0.02)
    threads = [
        threading.Thread(target=train, args=args, daemon=True)
        for args in zip(nets, groups, delays, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return [[*net.buffers()] for net in nets]


def test_models_may_train_in_threads_of_their_own(ranks: RankPool) -> None:
    one, other = ranks.run(_in_threads, 2)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
