"""Activation checkpointing across ranks: the batch counts once, and all ranks keep their order."""

import functools
import gc
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import bnrewrite
from bnrewrite.ops import checkpointing
from tests.models import Block, perturb
from tests.ranks import CountCollectives, RankPool

SAVED = (
    torch.ops.bnrewrite.moments.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.wait_tensor.default,
)
"""Ops that a policy keeps the results of, so that nothing is communicated again."""


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


NESTED = {
    f"{outer} around {inner}": (outer == "reentrant", inner == "reentrant")
    for outer in ("reentrant", "non-reentrant")
    for inner in ("reentrant", "non-reentrant")
}
"""Checkpoints in checkpoints: whether each of the two is reentrant."""


class Net(nn.Module):
    """Two checkpointed blocks between a stem and a head: nine sites."""

    NUM_INSIDE = 6

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList([Block(4, 4, 1), Block(4, 6, 2), nn.BatchNorm2d(6)])
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(96, 3), nn.BatchNorm1d(3))
        self.how = "none"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "selective around all":
            contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
            return checkpoint(self._all, x, use_reentrant=False, context_fn=contexts)
        return self._all(x)

    def _all(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self._run(block, x)
        return self.head(x)

    def _run(self, block: nn.Module, x: Tensor) -> Any:
        if self.how in ("none", "selective around all"):
            return block(x)
        if self.how == "selective":
            contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
            return checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        if self.how in NESTED:
            outer, inner = NESTED[self.how]
            inside = functools.partial(checkpoint, block, use_reentrant=inner)
            return checkpoint(inside, x, use_reentrant=outer)
        if self.how == "sequential":
            return checkpoint_sequential(nn.Sequential(block), 1, x, use_reentrant=False)
        return checkpoint(block, x, use_reentrant=self.how == "reentrant")


def _net(how: str = "none") -> Net:
    torch.manual_seed(2)
    model = Net()
    perturb(model.double())
    model.how = how
    return model


def _x(num: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(num, 3, 8, 8, generator=generator, dtype=torch.float64)


def _train(model: Any, parts: list[slice], scale: float) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        for part in parts:
            y = model(_x(6, step)[part])
            (y * torch.sin(torch.arange(18.0).view(6, 3)[part])).sum().mul(scale).backward()
        optimizer.step()
    return [tensor.detach() for tensor in model.state_dict().values()]


def _rank(rank: int, world_size: int, how: str, wrap: str) -> list[Tensor]:
    model = bnrewrite.convert(_net(how))
    rows = slice(2, 6) if rank else slice(0, 2)
    if wrap == "FSDP2":
        mesh = init_device_mesh("cpu", (world_size,))
        for block in (*model.blocks[:2], model):
            fully_shard(block, mesh=mesh)
        _train(model, [rows], world_size)
        states = model.state_dict().values()
        return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in states]  # pyright: ignore
    ddp = DistributedDataParallel(
        model,
        static_graph=wrap == "static graph",
        find_unused_parameters=wrap == "unused parameters",
    )
    return [*_train(ddp, [rows], world_size)]


def _expected() -> list[Tensor]:
    return _train(_net(), [slice(0, 6)], 1.0)


def _assert_equal(results: list[list[Tensor]], expected: list[Tensor]) -> None:
    for result in results:
        for ours, theirs in zip(result, expected, strict=True):
            # float64 sums in another order.
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "how",
    [
        "none", "reentrant", "non-reentrant", "sequential", "selective", "selective around all",
        *NESTED,
    ],
)  # fmt: skip
def test_training_equals_one_process_without_checkpointing(ranks: RankPool, how: str) -> None:
    plain = ("none", "non-reentrant", "sequential", "selective", "selective around all")
    wrap = "DDP" if how in plain else "static graph"
    _assert_equal(ranks.run(_rank, 2, how, wrap), _expected())


@pytest.mark.parametrize("wrap", ["static graph", "unused parameters", "FSDP2"])
@pytest.mark.parametrize("how", ["none", "non-reentrant"])
def test_so_it_does_with_other_wrappers(ranks: RankPool, how: str, wrap: str) -> None:
    _assert_equal(ranks.run(_rank, 2, how, wrap), _expected())


HOWS = ("none", "reentrant", "non-reentrant", "selective", "selective around all", *NESTED)


def _count(rank: int, world_size: int, passes: tuple[str, ...] | None) -> dict[str, Any]:
    """Collectives and gradients of a step, for every way to checkpoint."""
    found = {}
    for how in HOWS:
        model = bnrewrite.convert(_net(how), passes=passes)
        with CountCollectives() as comm:
            model(_x(2 + rank, 0)).square().sum().backward()
        assert int(model.get_buffer("blocks.0.bn1.num_batches_tracked")) == 1
        found[how] = [(name, size) for name, _, size in comm.seen], _gradients(model)
    return found


def _gradients(model: nn.Module) -> list[Tensor]:
    return [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


@pytest.mark.parametrize("passes", [(), None], ids=["no passes", "all passes"])
def test_recomputation_communicates_nothing_again(
    ranks: RankPool, passes: tuple[str, ...] | None
) -> None:
    for found in ranks.run(_count, 2, passes):
        seen, expected = found["none"]
        assert len(seen) == 2 * (8 if passes == () else 7)
        for how in HOWS:
            assert sorted(found[how][0]) == sorted(seen), how
            for ours, theirs in zip(found[how][1], expected, strict=True):
                assert torch.equal(ours, theirs), how


class Twice(nn.Module):
    """A checkpoint that evaluates one site twice, and is itself called twice before backward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm = perturb(nn.Sequential(nn.BatchNorm1d(3), nn.Tanh())).double()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        def inside(x: Tensor) -> Tensor:
            return self.norm(self.norm(x) * x)

        if self.how == "none":
            return inside(inside(x) + x)
        run = functools.partial(checkpoint, use_reentrant=self.how == "reentrant")
        return run(inside, run(inside, x) + x)  # pyright: ignore


def _twice(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    found = {}
    for how in ("none", "reentrant", "non-reentrant"):
        torch.manual_seed(0)
        model = bnrewrite.convert(Twice(how))
        torch.manual_seed(rank)
        x, other = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        # Backward runs the later forward again first; the first is run again a second time.
        loss, later = model(x).square().sum(), model(other).cos().sum()
        with CountCollectives() as comm:
            later.backward()
            loss.backward(retain_graph=True)
            loss.backward()
        assert len(comm.seen) == 3 * 4
        assert x.grad is not None
        assert other.grad is not None
        found[how] = [x.grad, other.grad, *_gradients(model), *model.buffers()]
    return found


def test_every_evaluation_finds_its_own_result(ranks: RankPool) -> None:
    for found in ranks.run(_twice, 2):
        for how in ("reentrant", "non-reentrant"):
            _assert_equal([found[how]], found["none"])


def _abandoned(rank: int, world_size: int, how: str) -> int:
    """Results that are still kept after a forward whose backward never comes."""
    model = bnrewrite.convert(_net(how))
    y = model(_x(2, 0))
    assert _num_records() > 0
    del y
    return _num_records()


def _num_records() -> int:
    gc.collect()
    return sum(type(one) is checkpointing._Record for one in gc.get_objects())


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_what_was_kept_goes_with_the_graph(ranks: RankPool, how: str) -> None:
    assert ranks.run(_abandoned, 2, how) == [0, 0]


def _untracked(rank: int, world_size: int) -> list[tuple[int, list[Tensor]]]:
    """Collectives and gradients without checkpointing and with it."""
    found = []
    for how in (False, True):
        torch.manual_seed(0)
        norms = nn.Sequential(
            nn.BatchNorm1d(3, affine=False, track_running_stats=False), nn.Linear(3, 3)
        ).double()
        bnrewrite.convert(norms)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        with CountCollectives() as comm:
            y = checkpoint(norms, x, use_reentrant=False) if how else norms(x)
            y.square().sum().backward()  # pyright: ignore
        found.append((len(comm.seen), _gradients(norms)))
    return found


def test_sites_without_running_statistics_communicate_again(ranks: RankPool) -> None:
    for (num, gradients), (num_again, same) in ranks.run(_untracked, 2):
        assert (num, num_again) == (2, 3)
        assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def _another_shape(rank: int, world_size: int) -> str:
    model = bnrewrite.convert(nn.BatchNorm1d(3))
    sizes = [4, 2]
    x = torch.randn(4, 3, requires_grad=True)

    def inside(x: Tensor) -> Tensor:
        return model(x[: sizes.pop(0)])

    y: Any = checkpoint(inside, x, use_reentrant=False)
    with pytest.raises(bnrewrite.BnRewriteError) as caught:
        y.sum().backward()
    return str(caught.value)


def test_a_forward_that_does_something_else_again_is_an_error(ranks: RankPool) -> None:
    for message in ranks.run(_another_shape, 2):
        assert "shape (2, 3) where the first run had (4, 3)" in message


def _compiled(rank: int, world_size: int, inside: bool) -> list[Tensor]:
    # Dynamo looks at the gradients of inputs that are no leaves.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    model = bnrewrite.convert(_net("non-reentrant"))
    if inside:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    else:
        model.compile(backend="aot_eager", fullgraph=True)
    rows = slice(2, 6) if rank else slice(0, 2)
    return _train(DistributedDataParallel(model), [rows], world_size)


@pytest.mark.parametrize("inside", [True, False], ids=["compiled blocks", "compiled model"])
def test_compiled_checkpointing_counts_a_batch_once(ranks: RankPool, inside: bool) -> None:
    results = ranks.run(_compiled, 2, inside, timeout_s=200)
    _assert_equal(results, _expected())


class _Counted(nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return weight.exp()


def _beside_a_parametrized_model(rank: int, world_size: int) -> tuple[list[Tensor], int]:
    other = nn.BatchNorm2d(3)
    counted = _Counted()
    nn.utils.parametrize.register_parametrization(other, "weight", counted)
    other = bnrewrite.convert(other)
    counted.count = 0
    return _compiled(rank, world_size, True), counted.count


def test_compiling_computes_nothing_of_other_models(ranks: RankPool) -> None:
    """What it computed, and saved for its gradient, the checkpoint would miss the second time."""
    results = ranks.run(_beside_a_parametrized_model, 2, timeout_s=200)
    _assert_equal([state for state, _ in results], _expected())
    assert [count for _, count in results] == [0, 0]


# Other ways to step


def _ways(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    rows = slice(2, 6) if rank else slice(0, 2)
    found = {}
    model = DistributedDataParallel(bnrewrite.convert(_net()))
    with model.no_sync():
        _backward(model, 0, rows, world_size)
    _backward(model, 1, rows, world_size)
    found["no_sync"] = _state(model.module)
    model = bnrewrite.convert(_net())
    total = _loss(model, 0, rows) + _loss(model, 1, rows)
    total.backward()
    found["two forwards before one backward"] = _state(_reduced(model))
    model = bnrewrite.convert(_net())
    _loss(model, 0, rows)
    with torch.no_grad():
        model(_x(6, 3)[rows])
    with torch.inference_mode():
        model(_x(6, 4)[rows])
    _loss(model, 1, rows).backward()
    found["forwards without backward"] = _state(_reduced(model))
    model = bnrewrite.convert(_net())
    parameters = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, parameters, (_x(6, 0)[rows],))
    found["functional_call"] = [y.detach(), *model.buffers()]
    return found


def _loss(model: Any, step: int, rows: slice) -> Tensor:
    return (model(_x(6, step)[rows]) * torch.sin(torch.arange(18.0).view(6, 3)[rows])).sum()


def _backward(model: Any, step: int, rows: slice, scale: float) -> None:
    (_loss(model, step, rows) * scale).backward()


def _reduced(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return model


def _state(model: nn.Module) -> list[Tensor]:
    return [*(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def test_other_ways_to_step_equal_one_process(ranks: RankPool) -> None:
    every = slice(0, 6)
    accumulated = _net()
    for step in (0, 1):
        _loss(accumulated, step, every).backward()
    evaluated = _net()
    _loss(evaluated, 0, every)
    with torch.no_grad():
        evaluated(_x(6, 3))
        evaluated(_x(6, 4))
    _loss(evaluated, 1, every).backward()
    called = _net()
    parameters = {name: p.detach() * 1.5 for name, p in called.named_parameters()}
    y = torch.func.functional_call(called, parameters, (_x(6, 0),)).detach()
    for rank, found in enumerate(ranks.run(_ways, 2)):
        rows = slice(2, 6) if rank else slice(0, 2)
        _assert_equal([found["no_sync"]], _state(accumulated))
        _assert_equal([found["two forwards before one backward"]], _state(accumulated))
        _assert_equal([found["forwards without backward"]], _state(evaluated))
        _assert_equal([found["functional_call"]], [y[rows], *called.buffers()])
