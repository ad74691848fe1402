"""States loaded between steps: the buffers of rank 0 win again, whoever loaded, and only then."""

import copy
import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnrewrite
from bnrewrite.sites import schedule
from tests.models import ResidualNet, perturb
from tests.processes import Worlds, run
from tests.ranks import CountCollectives, RankPool

MODES: dict[str, Any] = {"sync": "sync", "shuffle": bnrewrite.Shuffle(running="group")}


def _step(model: Any, step: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(7 * step + rank)
    model(torch.randn(2, 3, 8, 8, generator=generator)).square().sum().backward()


def _shifted(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """A state of ``model`` with other buffers, which differ between ranks; copies."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_buffers():
        state[name] += rank + 1
    return state


def _reset(ddp: Any, rank: int) -> None:
    for module in ddp.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


LOADS: dict[str, Callable[[Any, int], None]] = {
    "model": lambda ddp, rank: ddp.module.load_state_dict(_shifted(ddp.module, rank)),
    "submodule": lambda ddp, rank: ddp.module.layer1.load_state_dict(
        _shifted(ddp.module.layer1, rank)
    ),
    "wrapper": lambda ddp, rank: ddp.load_state_dict(_shifted(ddp, rank)),
    # DDP itself does not take new parameters.
    "assigned buffers": lambda ddp, rank: ddp.load_state_dict(
        {n: t for n, t in _shifted(ddp, rank).items() if "running" in n}, strict=False, assign=True
    ),
    "reset": _reset,
}


def _run(rank: int, world_size: int, mode: str, what: str, loaders: tuple[int, ...]) -> Any:
    torch.manual_seed(0)
    model = bnrewrite.convert(perturb(ResidualNet()), MODES[mode])
    ddp = DistributedDataParallel(model)
    for step in range(2):
        _step(ddp, step, rank)
    if rank in loaders:
        # As rank 0 loads it, so that all loading ranks together are a run to compare with.
        LOADS[what](ddp, rank)
    _step(ddp, 2, rank)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with CountCollectives() as comm:
        _step(ddp, 3, rank)
    assert not [name for name, _, _ in comm.seen if "broadcast" in name]
    return buffers


@pytest.mark.parametrize(
    ("mode", "what", "loaders"),
    [
        ("sync", "model", (0, 1, 2)),
        ("sync", "model", (0,)),
        ("sync", "model", (1,)),
        ("sync", "submodule", (0, 2)),
        ("sync", "wrapper", (2,)),
        ("sync", "assigned buffers", (0,)),
        ("sync", "reset", (0,)),
        ("sync", "reset", (1,)),
        ("shuffle", "model", (1, 2)),
        ("shuffle", "model", (0, 1, 2)),
    ],
)
def test_the_buffers_of_rank_0_win_before_the_next_step(
    ranks: RankPool, mode: str, what: str, loaders: tuple[int, ...]
) -> None:
    """As if all ranks had loaded what rank 0 has, or nothing if rank 0 has loaded nothing."""
    results = ranks.run(_run, 3, mode, what, loaders)
    same = ranks.run(_run, 3, mode, what, (0, 1, 2) if 0 in loaders else ())
    for buffers in results:
        for name, buffer in same[0].items():
            assert torch.equal(buffers[name], buffer), name


def _put_back(rank: int, world_size: int, form: str) -> list[int]:
    """Agreements after rank 0 has tried the best state so far and put its own back."""
    torch.manual_seed(0)
    model: Any = bnrewrite.convert(ResidualNet())
    if form == "compiled":
        model.compile(backend="aot_eager", fullgraph=True)
    ddp = DistributedDataParallel(model)
    _step(ddp, 0, rank)
    if form == "not a number":
        model.bn.running_var[0] = float("nan")
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        agree = schedule.agree
        patch.setattr(schedule, "agree", lambda *a, **k: (calls.append(a), agree(*a, **k))[1])
        if rank == 0:
            own = {name: tensor.clone() for name, tensor in ddp.module.state_dict().items()}
            ddp.module.load_state_dict(_shifted(ddp.module, rank))
            with torch.no_grad():
                ddp.module.eval()(torch.randn(2, 3, 8, 8))
            ddp.module.train().load_state_dict(own)
        for step in range(1, 4):
            _step(ddp, step, rank)
            counts.append(len(calls))
        ddp.module.load_state_dict(ddp.module.state_dict())
        _step(ddp, 4, rank)
        counts.append(len(calls))
    return counts


@pytest.mark.parametrize("form", ["eager", "compiled", "not a number"])
def test_a_state_that_was_put_back_asks_nobody(ranks: RankPool, form: str) -> None:
    assert ranks.run(_put_back, 2, form) == [[0, 0, 0, 0]] * 2


def _evaluate_after(rank: int, world_size: int, form: str, loaders: tuple[int, ...]) -> float:
    """Seconds that rank 0 evaluates, by the wrapper, while rank 1 is in its next step already."""
    torch.manual_seed(0)
    model: Any = bnrewrite.convert(ResidualNet())
    if form == "compiled":
        model.compile(backend="aot_eager", fullgraph=True)
    ddp = DistributedDataParallel(model)
    for step in range(2):
        _step(ddp, step, rank)
    if rank in loaders:
        ddp.module.load_state_dict(_shifted(ddp.module, 0))
    waited_s = 0.0
    if rank == 0:
        with torch.no_grad():
            model.eval()(torch.randn(2, 3, 8, 8))
            start = time.monotonic()
            for _ in range(3):
                ddp.eval()(torch.randn(2, 3, 8, 8))
            waited_s = time.monotonic() - start
        # Longer than ranks of which only one is about to communicate wait for each other.
        time.sleep(2.0)
        ddp.train()
    _step(ddp, 2, rank)
    return waited_s


@pytest.mark.parametrize(
    ("form", "loaders"), [("eager", (0, 1)), ("eager", (0,)), ("compiled", (0, 1))]
)
def test_who_evaluates_after_a_load_waits_for_nobody(
    ranks: RankPool, form: str, loaders: tuple[int, ...]
) -> None:
    waited_s, _ = ranks.run(_evaluate_after, 2, form, loaders)
    assert waited_s < schedule._PATIENCE_S


def _two_models(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """The ranks are about to run another model than the one that a rank has loaded."""
    # Ranks may have converted different numbers of models before.
    schedule._conversions = itertools.count(rank)
    torch.manual_seed(0)
    models: list[Any] = [
        DistributedDataParallel(bnrewrite.convert(ResidualNet(width))) for width in (4, 8)
    ]
    for step in range(2):
        for model in models:
            _step(model, step, rank)
    if rank == 1:
        models[0].load_state_dict(_shifted(models[0], rank))
    for model in models:
        _step(model, 2, rank)
    return [dict(model.named_buffers()) for model in models]


def test_the_model_that_was_loaded_is_the_one_that_is_corrected(ranks: RankPool) -> None:
    one, two = ranks.run(_two_models, 2)
    for mine, other in zip(one, two, strict=True):
        for name, buffer in mine.items():
            assert torch.equal(buffer, other[name]), name


def _compiled(rank: int, world_size: int, how: str, loaders: tuple[int, ...]) -> Any:
    torch.compiler.reset()
    model = bnrewrite.convert(perturb(ResidualNet()))
    if how == "inside DDP":
        model.compile(backend="aot_eager", fullgraph=True)
    ddp = DistributedDataParallel(model)
    run: Any = torch.compile(ddp, backend="aot_eager") if how == "around DDP" else ddp
    for step in range(2):
        _step(run, step, rank)
    if rank in loaders:
        ddp.load_state_dict(_shifted(ddp, rank))
    try:
        _step(run, 2, rank)
    except bnrewrite.BnRewriteError as error:
        return type(error).__name__, str(error)
    return dict(model.named_buffers())


@pytest.mark.parametrize("how", ["inside DDP", "around DDP"])
def test_compiled_models_take_over_what_rank_0_loaded_if_all_ranks_loaded(
    ranks: RankPool, how: str
) -> None:
    expected = ranks.run(_compiled, 2, "eager", (0, 1))[0]
    one, two = ranks.run(_compiled, 2, how, (0, 1))
    # Steps in another order of arithmetic, in float32.
    torch.testing.assert_close(one, expected)
    for name, buffer in one.items():
        assert torch.equal(buffer, two[name]), name


def _some_compiled(worlds: Worlds) -> Any:
    worlds.join("first", [0, 1])
    return _compiled(worlds.rank, 2, "inside DDP", (1,))


def test_compiled_models_raise_on_every_rank_if_some_loaded() -> None:
    for kind, message in run(_some_compiled, 2, timeout_s=60.0):
        assert kind == "ScheduleError"
        assert re.search("First difference: the state. .*load on all ranks", message), message


def _with_a_copy(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """A teacher that looks like the student in all but its numbers, and was used last."""
    torch.manual_seed(0)
    student: Any = DistributedDataParallel(bnrewrite.convert(ResidualNet()))
    teacher: Any = DistributedDataParallel(copy.deepcopy(student.module))
    for step in range(2):
        _step(student, step, rank)
        _step(teacher, step + 7, rank)
    if rank == 1:
        student.load_state_dict(_shifted(student, rank))
    before = {name: buffer.clone() for name, buffer in student.module.named_buffers()}
    with torch.no_grad():
        student(torch.randn(2, 3, 8, 8))
    return [before, dict(student.module.named_buffers()), dict(teacher.module.named_buffers())]


def test_a_copy_of_the_model_is_left_alone(ranks: RankPool) -> None:
    (before, *mine), (_, *others) = ranks.run(_with_a_copy, 2)
    for models in zip(mine, others, strict=True):
        for name in before:
            assert torch.equal(models[0][name], models[1][name]), name
    assert int(mine[0]["bn.num_batches_tracked"]) == int(before["bn.num_batches_tracked"]) + 1
    assert float((mine[0]["bn.running_var"] - before["bn.running_var"]).abs().max()) < 0.5


def _gone(rank: int, world_size: int) -> tuple[str, str, float]:
    """Rank 0 does not come back; it hangs in something else than a collective of a site."""
    model = bnrewrite.convert(ResidualNet())
    ddp = DistributedDataParallel(model)
    _step(ddp, 0, rank)
    start = time.monotonic()
    if rank == 0:
        time.sleep(5)
        return "", "", 0.0
    ddp.load_state_dict(_shifted(ddp, rank))
    with pytest.MonkeyPatch.context() as patch:
        from bnrewrite import agreement

        patch.setattr(agreement._groups[agreement.default_group().group_name], "timeout_s", 3.0)
        with pytest.raises(bnrewrite.PeerError) as caught:
            _step(ddp, 1, rank)
    return "PeerError", str(caught.value), time.monotonic() - start


def test_a_rank_that_cannot_be_corrected_is_named(ranks: RankPool) -> None:
    _, message, _ = ranks.run(_gone, 2)[1]
    assert re.search(r"rank\(s\) \[0\].*This rank has loaded a state_dict since", message)
