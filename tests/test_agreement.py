"""Ranks that differ hear of it, all of them, within seconds; ranks that agree pay once."""

import copy
import itertools
import pickle
import re
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import register_parametrization

import bnrewrite
from bnrewrite import agreement, watch
from bnrewrite.differences import first_site
from bnrewrite.sites import schedule
from bnrewrite.sites.schedule import schedule_of
from tests.models import Functional, ResidualNet
from tests.ranks import RankPool

SECONDS = 20.0
"""Longest time to an error on a busy machine. The time-out of the group is a minute."""

SOON_S = 0.2
"""When a rank that waits looks what the others do, in tests that are not about how long it takes:
after twice as long, and a second."""


def _net() -> nn.Module:
    torch.manual_seed(0)
    return bnrewrite.convert(ResidualNet())


def _x() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def _step(model: Any, x: Tensor | None = None) -> None:
    model(_x() if x is None else x).square().sum().backward()


Outcome = tuple[str, str, float]


def _outcome(function: Callable[..., Any], *args: Any) -> Outcome:
    """Class and message of the error that ``function`` raised, and how long that took."""
    start = time.monotonic()
    try:
        function(*args)
    except bnrewrite.BnRewriteError as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


class Counted(nn.Module):
    """A parametrization that counts how often its tensor is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.num_computed = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.num_computed += 1
        return weight * 2


def _warnings(model: nn.Module) -> list[str]:
    """What two epochs warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            _step(model.train())
            model.eval()
    return [str(one.message) for one in caught]


def _added(rank: int, world_size: int, mode: Any, when: str) -> list[str]:
    """Warnings of two epochs, if a BatchNorm layer was put in after the conversion."""
    torch.manual_seed(0)
    model: Any = bnrewrite.convert(nn.Sequential(ResidualNet(), nn.Identity()), mode)
    if when == "later":
        _step(model)
        model.eval()
    # No module above it runs a graph.
    model[1] = nn.BatchNorm1d(3)
    if when == "copied":
        model = copy.deepcopy(model)
    if when == "compiled":
        model.compile(backend="eager", fullgraph=True)
    return _warnings(model)


@pytest.mark.parametrize("when", ["at once", "later", "copied", "compiled"])
def test_a_layer_added_after_the_conversion_is_a_warning(ranks: RankPool, when: str) -> None:
    """Its statistics are those of one rank, which nothing else would say."""
    for messages in ranks.run(_added, 2, "sync", when):
        (message,) = messages
        assert message.startswith("1: put in after convert()")
        assert "Call bnrewrite.convert(model) once more" in message


@pytest.mark.parametrize("mode", ["local", {"0.*": "sync"}], ids=str)
def test_a_layer_that_shall_not_communicate_may_be_added(ranks: RankPool, mode: object) -> None:
    assert ranks.run(_added, 2, mode, "at once") == [[], []]


def test_one_process_may_add_what_it_likes() -> None:
    assert _added(0, 1, "sync", "at once") == []


def test_ranks_without_a_process_group_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher has started several, and their script has forgotten one line."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    (message,) = _warnings(bnrewrite.convert(ResidualNet()))
    assert message.startswith("WORLD_SIZE is 2, but torch.distributed is not initialized")
    assert _warnings(bnrewrite.convert(ResidualNet(), "local")) == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert _warnings(bnrewrite.convert(ResidualNet())) == []


def _computed(rank: int, world_size: int) -> tuple[list[int], list[bool]]:
    """How often two training steps compute a parametrized weight, and what is said of it."""
    bn = nn.BatchNorm1d(3)
    register_parametrization(bn, "weight", counted := Counted(), unsafe=True)
    model = bnrewrite.convert(nn.Sequential(nn.Linear(3, 3), bn))
    before, counts = counted.num_computed, []
    for _ in range(2):
        model(torch.randn(4, 3)).sum().backward()
        counts.append(counted.num_computed - before)
    said = []
    for wanted in (True, False):
        bn.parametrizations["weight"].original.requires_grad_(wanted)  # pyright: ignore
        said.append("frozen" in str(bn._bnrewrite_lines()))  # pyright: ignore
    return counts, said


def test_agreement_computes_no_parametrized_weight(ranks: RankPool) -> None:
    assert ranks.run(_computed, 2) == [([1, 2], [False, True])] * 2


def _another_width(rank: int) -> nn.Module:
    return bnrewrite.convert(ResidualNet(width=4 + rank))


def _another_layer(rank: int) -> nn.Module:
    model = ResidualNet()
    if rank == 1:
        model.layer1 = nn.Sequential(model.layer1, nn.BatchNorm2d(4))  # pyright: ignore
    return bnrewrite.convert(model)


def _another_mode(rank: int) -> nn.Module:
    return bnrewrite.convert(ResidualNet(), {"bn": ["sync", "local"][rank], "*": "sync"})


def _other_options(rank: int) -> nn.Module:
    options = bnrewrite.Shuffle(backward="detach" if rank else "exact")
    return bnrewrite.convert(ResidualNet(), {"layer2.*": options, "*": "sync"})


def _all_local(rank: int) -> nn.Module:
    return bnrewrite.convert(ResidualNet(), ["sync", "local"][rank])


def _all_frozen(rank: int) -> nn.Module:
    model = bnrewrite.convert(ResidualNet(), ["sync", "frozen"][1 - rank])
    return model


def _one_evaluates(rank: int) -> nn.Module:
    model = _net()
    if rank == 1:
        model.get_submodule("layer1.bn2").eval()
    return model


def _all_evaluate(rank: int) -> nn.Module:
    model = _net()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and rank == 1:
            module.training = False
    return model


def _only_site_evaluates(rank: int) -> nn.Module:
    model = bnrewrite.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    if rank == 1:
        model[1].eval()
    return model


def _frozen_weight(rank: int) -> nn.Module:
    model = _net()
    model.get_parameter("layer1.bn1.weight").requires_grad_(rank == 0)
    return model


def _another_version(rank: int) -> nn.Module:
    model = _net()
    if rank == 1:
        # Undone by _build, since the process goes on to other tests.
        bnrewrite.__version__ = "0.0.7"
    return model


def _other_passes(rank: int) -> nn.Module:
    model = _net()
    own = schedule_of(model)
    assert own is not None
    own.passes = ("one", "two")[: rank + 1]
    return model


def _functional_evaluates(rank: int) -> nn.Module:
    model = bnrewrite.convert(nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(3), Functional(3)))
    model[2].train(rank == 0)
    return model


def _on_the_floor(rank: int) -> nn.Module:
    model = _one_evaluates(rank)
    for name in ("bn", "layer1.bn1", "layer1.bn2"):
        model.get_submodule(name).register_forward_hook(lambda *_: None)
    return model


def _hook(rank: int) -> nn.Module:
    model = _net()
    if rank == 1:
        model.get_submodule("layer2.bn1").register_forward_hook(lambda *_: None)
    return model


class _OptionalScale(nn.Module):
    """Two layers that share a collective, and an argument that not every call gives."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2)
        )

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.left(x) + self.right(x)
        return x if scale is None else x * scale


class _GivesScale(nn.Module):
    """Gives it on one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.inner, self.rank = _OptionalScale(), rank

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, torch.ones(())) if self.rank == 1 else self.inner(x)


def _argument(rank: int) -> nn.Module:
    model = _GivesScale(0)
    bnrewrite.convert(model.inner)
    model.rank = rank
    return model


CASES: dict[str, tuple[Callable[[int], nn.Module], str, str]] = {
    "hook": (_hook, r"the graph of layer2", "rank 1: its own forward runs, because .*hook"),
    "argument": (_argument, "the graph of the model itself", "rank 1: its own .* an argument"),
    "width": (_another_width, "bn", r"rank 0: Sync\(.*4 channels; rank 1: Sync\(.*5 channels"),
    "layer": (_another_layer, r"layer1\.0\.bn1", "rank 0: there is none; rank 1: Sync"),
    "mode": (_another_mode, "bn", r"rank 0: Sync\(.*; rank 1: Local\(.* communicates nothing"),
    "options": (_other_options, r"layer2\.bn1", "backward='exact'.*; rank 1: .*'detach'"),
    "all local": (_all_local, "bn", r"rank 0: Sync\(.*; rank 1: Local\("),
    "all frozen": (_all_frozen, "bn", r"rank 0: Frozen\(.*; rank 1: Sync\("),
    "one evaluates": (_one_evaluates, r"layer1\.bn2", r"rank 1: it evaluates \(training=False\)"),
    "all evaluate": (_all_evaluate, "bn", r"rank 1: it evaluates \(training=False\)"),
    "the only site evaluates": (_only_site_evaluates, "1", r"rank 1: it evaluates"),
    "frozen weight": (_frozen_weight, r"layer1\.bn1", "rank 1: .*its weight frozen"),
    "version": (_another_version, "the version of bnrewrite", r"rank 1: 0\.0\.7"),
    "passes": (_other_passes, "the passes", "rank 0: one; rank 1: one, two"),
    "functional": (_functional_evaluates, r"2\.batch_norm", "rank 0: Sync.*; rank 1: it evaluates"),
    "on the floor": (_on_the_floor, r"layer1\.bn2", "rank 1: it evaluates"),
}


def _as_if_new() -> None:
    """Counts conversions from zero, as a fresh process does, unlike those of a pool."""
    schedule._conversions = itertools.count()


def _build(rank: int, world_size: int, case: str, how: str) -> Outcome:
    version = bnrewrite.__version__
    _as_if_new()
    try:
        model: Any = CASES[case][0](rank)
        run = _step
        if how == "compiled":
            model = torch.compile(model, backend="aot_eager")
        if how == "by hand":
            run = bnrewrite.check
        return _outcome(run, model)
    finally:
        bnrewrite.__version__ = version


def _assert_all_heard(outcomes: list[Outcome], subject: str, said: str) -> None:
    for kind, message, seconds in outcomes:
        assert kind == "ScheduleError", message
        assert re.search(rf"First difference: {subject}\. ", message), message
        assert re.search(said, message), message
        assert "flags, hooks, arguments and version" in message
        assert "bnrewrite.check(model)" in message
        assert seconds < SECONDS


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_differ_raise_on_every_rank(ranks: RankPool, case: str) -> None:
    _, subject, said = CASES[case]
    _assert_all_heard(ranks.run(_build, 2, case, "eager"), subject, said)


@pytest.mark.parametrize("case", ["width", "mode", "one evaluates", "all local", "functional"])
@pytest.mark.parametrize("how", ["compiled", "by hand"])
def test_so_they_do_compiled_and_by_hand(ranks: RankPool, case: str, how: str) -> None:
    _, subject, said = CASES[case]
    _assert_all_heard(ranks.run(_build, 2, case, how), subject, said)


def test_so_they_do_when_a_call_is_compiled(ranks: RankPool) -> None:
    """Nobody knows by hand what calls will give."""
    _, subject, said = CASES["argument"]
    _assert_all_heard(ranks.run(_build, 2, "argument", "compiled"), subject, said)


def _one_of_four(rank: int, world_size: int) -> Outcome:
    model = _net()
    if rank == 2:
        model.get_submodule("layer2.bn1").eval()
    return _outcome(_step, model)


def test_with_four_ranks_all_hear_of_the_one_that_differs(ranks: RankPool) -> None:
    said = "rank 0: Sync.*; rank 2: it evaluates"
    _assert_all_heard(ranks.run(_one_of_four, 4), r"layer2\.bn1", said)


def _change_later(rank: int, world_size: int, change: str, mode: Any) -> tuple[Outcome, Outcome]:
    """Two good steps, then a flag changes on one rank; after that all ranks do the same again."""
    model = bnrewrite.convert(ResidualNet(), mode)
    for _ in range(2):
        _step(model)
    if rank == 1:
        model.get_submodule({"one": "layer1.bn2", "several": "layer2", "all": ""}[change]).eval()
    with pytest.MonkeyPatch.context() as patch:
        if change != "one":
            # One change waits as long as users do.
            patch.setattr(watch, "_SUSPICIOUS_S", SOON_S)
        failed = _outcome(_step, model)
    model.train()
    # The all-reduce in which rank 0 waited has no partner, so this world is spent.
    return failed, _outcome(bnrewrite.check, model)


@pytest.mark.parametrize(
    ("change", "subject"), [("one", r"layer1\.bn2"), ("several", r"layer2\.bn1"), ("all", "bn")]
)
@pytest.mark.parametrize(
    "mode", ["sync", "shuffle", bnrewrite.Shuffle(running="group")], ids=["sync", "ring", "group"]
)
def test_a_change_on_one_rank_between_steps_is_heard_by_all(
    ranks: RankPool, change: str, subject: str, mode: object
) -> None:
    """A rank that evaluates its whole model has nothing to communicate: its backward asks."""
    outcomes = ranks.run(_change_later, 2, change, mode)
    _assert_all_heard([first for first, _ in outcomes], subject, "rank 1: it evaluates")
    assert [kind for _, (kind, _, _) in outcomes] == ["", ""]


def _evaluate_alone(rank: int, world_size: int) -> list[float]:
    """Rank 0 evaluates with gradients enabled while rank 1 waits, and then goes on."""
    model = _net()
    _step(model)
    start = time.monotonic()
    if rank == 0:
        model.eval()
        for _ in range(6):
            model(_x())
            time.sleep(2 * SOON_S)
        model.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "_SUSPICIOUS_S", SOON_S)
        _step(model)
    return [time.monotonic() - start]


def test_a_rank_may_evaluate_for_long_while_others_wait(ranks: RankPool) -> None:
    for (seconds,) in ranks.run(_evaluate_alone, 2):
        assert seconds < SECONDS


def _attack(rank: int, world_size: int) -> list[int]:
    """Agreements of steps in which all ranks go backward through an evaluation, then train."""
    model = _net()
    counts = []
    for _ in range(3):
        with _Count() as count:
            _step(model.eval())
            _step(model.train())
        counts.append(count.num)
    return counts


def test_evaluation_with_gradients_on_all_ranks_is_agreed_on_once(ranks: RankPool) -> None:
    assert ranks.run(_attack, 2) == [[2, 0, 0]] * 2


def _explain_alone(rank: int, world_size: int, how: str) -> str:
    """Between steps, rank 0 alone asks for gradients of an evaluation, as saliency maps do."""
    wrapped = "DDP" in how
    model = _net()
    running: Any = DistributedDataParallel(model) if wrapped else model
    for step in range(4):
        running(_x()).square().mean().backward()
        if rank == 0 and step % 2:
            model.eval()
            x = _x().requires_grad_()
            y = model(x).square().mean()
            if "grad" in how:
                torch.autograd.grad(y, x)
            else:
                y.backward()
            model.train()
    return ""


@pytest.mark.parametrize("how", ["grad", "grad, under DDP", "backward, beside DDP"])
def test_a_rank_may_explain_its_evaluation_alone(ranks: RankPool, how: str) -> None:
    """Neither accumulates gradients that a training step would wait for."""
    assert ranks.run(_explain_alone, 2, how) == ["", ""]


class _Count:
    """Counts the agreements that happen while it is active."""

    def __enter__(self) -> "_Count":
        self.num = 0
        self._agree = agreement.agree

        def counting(*args: Any, **kwargs: Any) -> bool:
            self.num += 1
            return self._agree(*args, **kwargs)

        schedule.agree = counting
        return self

    def __exit__(self, *_: object) -> None:
        schedule.agree = self._agree


def _count_agreements(rank: int, world_size: int) -> dict[str, int]:
    model = _net()
    counts = {}

    def count(what: str, function: Callable[[], Any]) -> None:
        with _Count() as counted:
            function()
        counts[what] = counted.num

    count("first step", lambda: _step(model))
    count("second step", lambda: _step(model))
    count("two forwards", lambda: (model(_x()) + model(_x())).sum().backward())
    count("train() again", lambda: _step(model.train()))
    count("evaluation", lambda: model.eval()(_x()))
    count("training after it", lambda: _step(model.train()))
    with torch.no_grad():
        count("no_grad", lambda: model(_x()))
    model.get_submodule("layer1.bn1").eval()
    count("frozen everywhere", lambda: _step(model))
    count("frozen again", lambda: _step(model))
    model.train()
    count("thawed", lambda: _step(model))
    other = copy.deepcopy(model)
    count("a copy", lambda: _step(other))
    loaded = pickle.loads(pickle.dumps(model))
    count("a loaded copy", lambda: _step(loaded))
    part = copy.deepcopy(model.get_submodule("layer1"))
    count("a part", lambda: part(torch.randn(2, 8, 8, 8)))
    count("the first again", lambda: _step(model))
    count("by hand", lambda: bnrewrite.check(model))
    count("on the floor", lambda: model.get_submodule("bn")(torch.randn(2, 8, 3, 3)))
    bnrewrite.convert(model, "local")
    count("local", lambda: _step(model))
    count("local again", lambda: _step(model))
    return counts


def test_ranks_agree_once_for_each_schedule(ranks: RankPool) -> None:
    expected = {
        "first step": 1,
        "second step": 0,
        "two forwards": 0,
        "train() again": 0,
        "evaluation": 0,
        "training after it": 0,
        "no_grad": 0,
        "frozen everywhere": 1,
        "frozen again": 0,
        "thawed": 0,
        "a copy": 1,
        "a loaded copy": 1,
        "a part": 1,
        "the first again": 0,
        "by hand": 1,
        "on the floor": 0,
        "local": 1,
        "local again": 0,
    }
    assert ranks.run(_count_agreements, 2) == [expected] * 2


def _argument_again(rank: int, world_size: int) -> tuple[list[int], Tensor]:
    """Agreements of steps in which all ranks give an argument, by turns."""
    torch.manual_seed(0)
    model = bnrewrite.convert(_OptionalScale())
    counts = []
    for scale in (None, torch.ones(()), None, torch.ones(())):
        with _Count() as counted:
            model(_x(), scale).square().sum().backward()
        counts.append(counted.num)
    return counts, model.left[1].running_mean  # pyright: ignore


def test_ranks_agree_once_about_each_form_of_a_call(ranks: RankPool) -> None:
    (counts, mean), (others, other_mean) = ranks.run(_argument_again, 2)
    assert counts == others == [1, 1, 0, 0]
    assert torch.equal(mean, other_mean)


def _in_threads(rank: int, world_size: int) -> list[str]:
    """Errors of threads that train models which communicate nothing, and of one that does."""
    errors: list[str] = []
    together = threading.Barrier(6)

    def train(model: nn.Module) -> None:
        try:
            _step(model)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    def train_together(model: nn.Module) -> None:
        together.wait()
        train(model)

    models = [bnrewrite.convert(ResidualNet(), "local") for _ in range(6)]
    threads = [threading.Thread(target=train_together, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    train(bnrewrite.convert(ResidualNet()))
    return errors


def test_threads_agree_one_after_the_other(ranks: RankPool) -> None:
    assert ranks.run(_in_threads, 2) == [[], []]


def _local_alone(rank: int, world_size: int) -> list[int]:
    """Agreements of a rank whose model communicates nothing, in turns of training."""
    if rank == 1:
        return []
    model = bnrewrite.convert(ResidualNet(), "local")
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "_PATIENCE_S", SOON_S)
        for step in range(4):
            model.layer1.train(step % 2 == 0)
            with _Count() as counted:
                _step(model)
            counts.append(counted.num)
    return counts


def test_what_never_communicates_asks_once(ranks: RankPool) -> None:
    """The others may never answer; each question waits for them."""
    assert ranks.run(_local_alone, 2)[0] == [1, 0, 0, 0]


def _left_in_the_store(rank: int, world_size: int) -> tuple[Outcome, bool]:
    """Whether a difference leaves anything that a new group in the same store would read."""
    place = agreement._place(dist.distributed_c10d._get_default_group().group_name)
    model = _net()
    if rank == 1:
        model.get_submodule("bn").eval()
    first = place.round
    outcome = _outcome(_step, model)
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    keys = (f"{first}/{what}" for what in ("0", "0/text", "1", "1/text", "open", "verdict"))
    return outcome, any(store.check([f"bnrewrite/{key}"]) for key in keys)


def test_a_difference_leaves_nothing_in_the_store(ranks: RankPool) -> None:
    outcomes, left = zip(*ranks.run(_left_in_the_store, 2), strict=True)
    _assert_all_heard(list(outcomes), "bn", "rank 1: it evaluates")
    assert left == (False, False)


def _compiled_graphs(rank: int, world_size: int) -> tuple[int, int, int]:
    """Graphs that a model compiles to over some steps and sizes, with and without agreement."""
    from torch._dynamo.utils import counters

    graphs = []
    for check in ("1", "0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BNREWRITE_CHECK", check)
            torch._dynamo.reset()
            counters.clear()
            layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
            model = bnrewrite.convert(nn.Sequential(*layers))
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            for size in (2, 3, 4):
                _step(compiled, torch.randn(size, 3, 8, 8))
            model.eval()
            compiled(_x())
            model.train()
            with _Count() as count:
                _step(compiled)
            graphs.append(counters["stats"]["unique_graphs"])
    return graphs[0], graphs[1], count.num


def test_agreement_costs_no_graph_and_no_recompilation(ranks: RankPool) -> None:
    for with_check, without, num in ranks.run(_compiled_graphs, 2):
        assert with_check == without
        assert num == 0


def _alone(rank: int, world_size: int) -> list[float]:
    """What one rank does by itself, without a collective, is no business of the others."""
    _as_if_new()
    model = _net()
    local = bnrewrite.convert(ResidualNet(), "local")
    start = time.monotonic()
    if rank == 0:
        model.eval()(_x())
        _step(local)
        _step(local)
        copy.deepcopy(model).layer1.eval()(torch.randn(2, 8, 8, 8))
        model.train()
    alone_s = time.monotonic() - start
    _step(model)
    if rank == 1:
        # Of the backbone only, as a nearest-neighbor evaluation does, while the rest trains.
        model.get_submodule("layer1").eval()(torch.randn(2, 8, 8, 8))
        model.get_submodule("layer1").train()
    _step(model)
    _step(local)
    return [alone_s]


def test_a_rank_may_evaluate_and_train_locally_by_itself(ranks: RankPool) -> None:
    for (seconds,) in ranks.run(_alone, 2):
        assert seconds < SECONDS


def _wrong_order(rank: int, world_size: int) -> Outcome:
    one, two = _net(), bnrewrite.convert(ResidualNet(width=16))
    models = [one, two] if rank == 0 else [two, one]
    return _outcome(lambda: [_step(model) for model in models])


def _imagine_alone(rank: int, world_size: int, how: str) -> float:
    """One rank estimates what a step takes; seconds until it has, and both have trained."""
    torch.manual_seed(0)
    model = bnrewrite.convert(ResidualNet())
    x = torch.randn(2, 3, 8, 8)
    start = time.monotonic()
    if rank == 0 and how == "meta":
        with torch.device("meta"):
            y = bnrewrite.convert(ResidualNet())(torch.randn(2, 3, 8, 8))
        assert y.is_meta
    elif rank == 0:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(model(mode.from_tensor(x)), FakeTensor)
    waited_s = time.monotonic() - start
    model(x).sum().backward()
    return waited_s


@pytest.mark.parametrize("how", ["meta", "fake"])
def test_a_forward_that_computes_nothing_waits_for_nobody(ranks: RankPool, how: str) -> None:
    waited_s, _ = ranks.run(_imagine_alone, 2, how)
    assert waited_s < schedule._PATIENCE_S


class Offloaded(ResidualNet):
    """A part that this step does not run has no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(2, 2, device="meta")


def _offloaded(rank: int, world_size: int) -> str:
    torch.manual_seed(0)
    model = bnrewrite.convert(Offloaded())
    x = torch.randn(2, 3, 8, 8)
    if rank == 0:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(x))
    if rank == 1:
        model.bn.eval()
    with pytest.raises(bnrewrite.ScheduleError) as caught:
        model(x)
    return str(caught.value)


def test_a_part_without_memory_does_not_hide_a_difference(ranks: RankPool) -> None:
    for message in ranks.run(_offloaded, 2):
        assert "First difference: bn" in message


def test_models_used_in_another_order_are_a_difference(ranks: RankPool) -> None:
    _assert_all_heard(ranks.run(_wrong_order, 2), "bn", "rank 0: .*8 channels; .*16 channels")


def _in_sub_groups(rank: int, world_size: int, differs: bool) -> Outcome:
    halves: list[Any] = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    # The two groups need not agree with each other.
    model = ResidualNet(width=4 if rank < 2 else 8 + (rank == 3 and differs))
    bnrewrite.convert(model, process_group=halves[rank // 2])
    return _outcome(_step, model)


def test_sub_groups_agree_by_themselves(ranks: RankPool) -> None:
    assert [kind for kind, _, _ in ranks.run(_in_sub_groups, 4, False)] == [""] * 4
    outcomes = ranks.run(_in_sub_groups, 4, True)
    assert [kind for kind, _, _ in outcomes[:2]] == ["", ""]
    _assert_all_heard(outcomes[2:], "bn", "8 channels; rank 1: .*9 channels")


def _new_world(rank: int, world_size: int, store: str) -> tuple[int, Outcome]:
    model = _net()
    _step(model)
    dist.barrier()
    dist.destroy_process_group()
    _step(model)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    with _Count() as count:
        _step(model)
    if rank == 1:
        bnrewrite.convert(model, {"bn": "frozen", "*": "sync"})
    return count.num, _outcome(_step, model)


def test_a_new_world_agrees_again(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(_new_world, 2, f"file://{tmp_path}/again")
    assert [num for num, _ in results] == [1, 1]
    _assert_all_heard([outcome for _, outcome in results], "bn", "rank 1: Frozen")


def _unconverted(rank: int, world_size: int) -> tuple[str, str]:
    model = _net() if rank == 0 else ResidualNet()
    try:
        bnrewrite.check(nn.Sequential(model))
    except (bnrewrite.BnRewriteError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


def test_check_by_hand_finds_a_rank_without_conversion(ranks: RankPool) -> None:
    for kind, message in ranks.run(_unconverted, 2):
        assert kind == "ScheduleError"
        assert "not converted" in message


def test_check_by_hand_without_a_group() -> None:
    bnrewrite.check(_net())
    with pytest.raises(ValueError, match="ResidualNet is not converted"):
        bnrewrite.check(ResidualNet())
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, but it is str"):
        bnrewrite.check("model")  # pyright: ignore[reportArgumentType]


def _switched_off(rank: int, world_size: int) -> int:
    with pytest.MonkeyPatch.context() as patch, _Count() as count:
        patch.setenv("BNREWRITE_CHECK", "0")
        _step(_net())
    return count.num


def test_the_environment_switches_it_off(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.run(_switched_off, 2) == [0, 0]
    monkeypatch.setenv("BNREWRITE_CHECK", "no")
    from bnrewrite.settings import check_enabled

    with pytest.raises(ValueError, match="BNREWRITE_CHECK must be 0 or 1, but it is 'no'"):
        check_enabled()


def _absent(rank: int, world_size: int, store: str) -> Outcome:
    """Rank 1 never comes to the model."""
    from datetime import timedelta

    dist.barrier()
    dist.destroy_process_group()
    short = timedelta(seconds=4)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=short
    )
    if rank == 1:
        time.sleep(5)
        return "", "", 0.0
    return _outcome(_step, _net())


def test_a_rank_that_does_not_come_is_an_error_after_the_time_out(
    ranks: RankPool, tmp_path: Path
) -> None:
    kind, message, seconds = ranks.run(_absent, 2, f"file://{tmp_path}/short")[0]
    assert kind == "PeerError"
    assert re.search(
        r"rank\(s\) \[1\] of the default process group .* within 4 s.*Next on this rank: bn: Sync",
        message,
    )
    assert 3.5 < seconds < SECONDS


def _hostile(rank: int, world_size: int) -> Outcome:
    """A rank that publishes bytes that are no view."""
    if rank == 1:
        store: Any = dist.distributed_c10d._get_process_group_store(agreement.default_group())
        store.set("bnrewrite/0/1/text", '[[["<script>", "' + "x" * 5000 + '"]], []]')
        store.set("bnrewrite/0/1", '["00", "", true]')
        time.sleep(1)
        return "", "", 0.0
    return _outcome(_step, _net())


def test_what_another_rank_publishes_is_text_and_no_more(ranks: RankPool) -> None:
    kind, message, _ = ranks.run(_hostile, 2)[0]
    assert kind == "ScheduleError"
    assert len(message) < 2000
    source = Path(agreement.__file__).read_text()
    assert not re.search(r"^\s*(import|from) pickle|\beval\(|\bexec\(", source, re.M)


def test_a_model_without_a_group_pays_one_comparison() -> None:
    model = _net()
    own = schedule_of(model)
    assert own is not None
    _step(model)
    looked = []
    own.look = lambda **_: looked.append(1)  # pyright: ignore[reportAttributeAccessIssue]
    _step(model)
    F.relu(model(_x()))
    assert not looked
    model.get_submodule("layer1.bn1").training = False
    model(_x())
    assert looked


def test_a_model_that_is_a_site_is_the_first_one() -> None:
    site: Any = bnrewrite.convert(nn.BatchNorm2d(3))
    (line,) = [line for _, line in site._bnrewrite_lines()]
    lines = [
        ("the version of bnrewrite", "1"),
        ("the passes", "none"),
        ("the graph of a", "b"),
        line,
    ]
    assert first_site(lines).startswith("the model itself: ")
