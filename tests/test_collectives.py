"""Sums over ranks, by an all-reduce or by an all-gather: the same on every rank, chosen alike."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.compiled_autograd import _enable
from torch._functorch.aot_autograd import make_boxed_func
from torch.testing._internal.distributed.fake_pg import FakeStore

import bnrewrite
from bnrewrite import collectives, watch
from bnrewrite.groups import (
    DEFAULT_GROUP,
    active_group,
    find_group,
    group_of,
    name_in,
    parts_of,
    runs_on_gloo,
)
from tests.models import Block, ResidualNet, perturb
from tests.processes import Worlds, run
from tests.ranks import CountCollectives, RankPool

_LIMIT = collectives.MOST_GATHERED_BYTES // 8
SIZES = (1, 11, _LIMIT // 2, _LIMIT, _LIMIT + 1)


@pytest.mark.parametrize(
    ("argument", "name", "num_ranks"),
    [
        ("0", "0", 0),
        ("0/2", "0", 2),
        ("my/group", "my/group", 0),
        ("my/group/12", "my/group", 12),
        ("mesh_dp", "mesh_dp", 0),
        ("/3", "/3", 0),
        ("a/", "a/", 0),
        ("a/b/0", "a/b", 0),
    ],
)
def test_an_argument_says_the_name_and_who_gathers(
    argument: str, name: str, num_ranks: int
) -> None:
    assert name_in(argument) == name
    assert parts_of(argument)[1] == num_ranks


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("gloo", True), ("cpu:gloo", True), ("cpu:gloo,cuda:gloo", True), ("fake", False)],
)
def test_the_backend_of_the_cpu_decides(backend: str, expected: bool) -> None:
    # Torch calls the group itself otherwise once somebody has registered a backend, as this does.
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        assert runs_on_gloo(group) is expected
    finally:
        dist.destroy_process_group()


def test_a_slash_in_a_name_is_part_of_it() -> None:
    with pytest.raises(bnrewrite.GroupError, match="the process group 'stage/2' that"):
        find_group("stage/2")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        group: Any = dist.new_group([0, 1])
        names: Any = torch._C._distributed_c10d
        names._register_process_group("stage/2", group)
        group._set_group_name("stage/2")
        argument = active_group("stage/2", training=True)
        assert name_in(argument) == "stage/2"
        assert parts_of(argument)[1] == 0
        assert group_of(argument) is group
    finally:
        dist.destroy_process_group()


def _values(rank: int, size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def _sum(rank: int, world_size: int, size: int) -> tuple[list[str], Tensor, Tensor]:
    """What is sent, the sum of values, and its gradient."""
    values = _values(rank, size).requires_grad_()
    group = active_group(DEFAULT_GROUP, training=True)
    with CountCollectives() as count:
        total = collectives.all_reduce_sum(values, group)
        (grad,) = torch.autograd.grad(total, values, _values(10 + rank, size))
    assert torch.equal(collectives.all_reduce_sum(values.detach(), group), total)
    # Whoever calls an op with the name alone gets an all-reduce.
    torch.testing.assert_close(
        collectives.all_reduce_sum(values.detach(), name_in(group)), total, rtol=1e-12, atol=1e-12
    )
    return [name for name, *_ in count.seen], total.detach(), grad


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_the_same_sum(ranks: RankPool, world_size: int, size: int) -> None:
    results = ranks.run(_sum, world_size, size)
    expected = sum(_values(rank, size) for rank in range(world_size))
    gradient = sum(_values(10 + rank, size) for rank in range(world_size))
    for seen, total, grad in results:
        # A few float64 roundings of sums of terms near 1.
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, gradient, rtol=1e-12, atol=1e-12)
        assert torch.equal(total, results[0][1])
        # What a rank receives from the others decides.
        gathers = (world_size - 1) * size <= _LIMIT
        assert seen == ["all_gather_into_tensor" if gathers else "all_reduce"] * 2


def _net() -> nn.Module:
    torch.manual_seed(5)
    return perturb(ResidualNet().double())


def _train(model: Callable[..., Any], rank: int, steps: int = 2) -> list[Tensor]:
    seen = []
    for step in range(steps):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(2 + rank, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        y = model(x)
        y.square().sum().backward()
        seen += [y.detach(), x.grad]
    return seen


def _by_all_reduce(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    model = bnrewrite.convert(_net())
    gathered = [*_train(model, rank), *model.state_dict().values()]
    model = bnrewrite.convert(_net())
    with mock.patch.object(collectives, "MOST_GATHERED_BYTES", -1):
        reduced = [*_train(model, rank), *(t.clone() for t in model.state_dict().values())]
        with CountCollectives() as count:
            model(torch.randn(1, 3, 8, 8, dtype=torch.float64))
    assert {name for name, *_ in count.seen} == {"all_reduce"}
    return gathered, reduced


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_is_the_same_by_either(ranks: RankPool, world_size: int) -> None:
    for gathered, reduced in ranks.run(_by_all_reduce, world_size):
        torch.testing.assert_close(gathered, reduced, rtol=1e-9, atol=1e-9)


def _zero_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.zero_()


def _change_gradients(rank: int, world_size: int, by_gather: bool) -> list[Tensor | None]:
    """Input gradients where a hook writes into those of the weights before the collective runs."""
    deferred: dict[int, Callable[[], Tensor]] = {}

    def launch(what: str, result: Tensor, *rest: Any) -> Tensor:
        deferred[id(result)] = lambda: watch.finish(watch.launch(what, result, *rest))
        return result

    found = []
    for hook in (False, True):
        model = bnrewrite.convert(_net())
        for name, parameter in model.named_parameters():
            if hook and "bn" in name:
                parameter.register_post_accumulate_grad_hook(_zero_gradient)
        with mock.patch.multiple(
            collectives,
            launch=launch,
            is_watched=lambda pending: id(pending) in deferred,
            finish=lambda pending: deferred.pop(id(pending))(),
            MOST_GATHERED_BYTES=collectives.MOST_GATHERED_BYTES if by_gather else -1,
        ):
            found.append(_train(model, rank, steps=1)[1])
    return found


@pytest.mark.parametrize("by_gather", [True, False])
def test_what_is_under_way_is_nobodys_gradient(ranks: RankPool, by_gather: bool) -> None:
    for left, changed in ranks.run(_change_gradients, 2, by_gather):
        assert torch.equal(left, changed)


def _unlike(rank: int, world_size: int, what: str) -> list[Tensor]:
    """Training of which rank 0 sees more, or which it compiles."""
    model = bnrewrite.convert(_net())
    if rank == 0 and what == "compiled":
        return _train(torch.compile(model, backend="aot_eager", fullgraph=True), rank)
    if rank == 0 and what == "mode":
        with CountCollectives():
            return _train(model, rank)
    if rank == 0 and what == "profiler":
        with torch.profiler.profile(acc_events=True):
            return _train(model, rank)
    return _train(model, rank)


@pytest.mark.parametrize("what", ["compiled", "mode", "profiler"])
def test_ranks_choose_alike_whatever_looks_at_one_of_them(ranks: RankPool, what: str) -> None:
    expected = ranks.run(_unlike, 3, "")
    for result, true in zip(ranks.run(_unlike, 3, what), expected, strict=True):
        torch.testing.assert_close(result, true, rtol=1e-9, atol=1e-9)


def _exported(rank: int, world_size: int, strict: bool) -> list[str]:
    model = bnrewrite.convert(nn.Sequential(nn.BatchNorm1d(4)).double())
    x = torch.randn(3 + rank, 4, dtype=torch.float64)
    program = torch.export.export(model, (x,), strict=strict)
    nodes = program.graph.find_nodes(
        op="call_function", target=torch.ops.bnrewrite.batch_norm.default
    )
    groups = [str(node.args[10]) for node in nodes]
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-12, atol=1e-12)
    assert not [name for name in vars(bnrewrite.groups) if "bnrewrite_asks" in name]
    return groups


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_fits_groups_of_any_size(ranks: RankPool, strict: bool) -> None:
    assert ranks.run(_exported, 2, strict) == [["0"]] * 2


class Broken(nn.Module):
    """A child that cannot be compiled as a whole, which runs while a collective is under way."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cos() + 1 if x.sum().item() > 1e9 else x.cos()


class Around(nn.Module):
    """Two sites that share a collective, and a child that needs neither."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1)
        self.conv3 = nn.Conv1d(3, 2, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.child = Broken()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.bn1(self.conv1(x)), self.bn2(self.conv2(x))
        return a.sum() + b.sum() + self.child(self.conv3(x).sin()).sum()


def _in_two_graphs(rank: int, world_size: int) -> int:
    """Launches whose wait is in another graph: what they send must outlive theirs."""
    launched = 0

    def compiler(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal launched
        (output,) = module.graph.find_nodes(op="output")
        waits = [node for node in module.graph.nodes if node.target is collectives.WAIT]
        for node in module.graph.nodes:
            if collectives.is_launch(node.target) and not waits:
                launched += 1
                assert node.args[0] in output.all_input_nodes
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    model = bnrewrite.convert(Around().double())
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        found = torch.compile(model, backend=aot_autograd(fw_compiler=compiler))(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    return launched


def test_what_is_sent_outlives_a_graph_that_does_not_wait(ranks: RankPool) -> None:
    assert ranks.run(_in_two_graphs, 2) == [1, 1]


class Branching(nn.Module):
    """More sites than Dynamo compiles frames for, in a forward that asks for a value."""

    def __init__(self, *, conv: bool) -> None:
        super().__init__()
        widths = range(3, 15)
        bn = nn.BatchNorm1d
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(c, c + 1, 1) if conv else nn.Linear(c, c + 1), bn(c + 1))
            for c in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if float(x.detach().abs().max()) > 1e30:
                break
        return x


def _whole_step(rank: int, world_size: int, conv: bool) -> bool:
    """Whether a compiled function that goes backward itself gives the gradients of eager mode."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = bnrewrite.convert(Branching(conv=conv).double())
    x = torch.randn(5 + rank, 3, *((4,) if conv else ()), dtype=torch.float64)

    def step() -> None:
        (model(x) ** 3).mean().backward()

    found = []
    for run_step in (step, torch.compile(step, backend="eager")):
        model.zero_grad()
        with warnings.catch_warnings():
            # Of torch, about attributes that Dynamo looks at.
            warnings.simplefilter("ignore")
            run_step()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    return True


@pytest.mark.parametrize("conv", [False, True])
def test_a_backward_within_a_compiled_function_loses_nothing(ranks: RankPool, conv: bool) -> None:
    assert ranks.run(_whole_step, 2, conv) == [True, True]


def _by_compiled_autograd(rank: int, world_size: int) -> bool:
    """Whether a backward that is traced as one gives the gradients of eager mode.

    Two of its three sites share a collective; Dynamo breaks its graph at each.
    """
    torch.manual_seed(5)
    model = bnrewrite.convert(nn.Sequential(nn.Conv2d(3, 8, 1), Block(8, 16, 2)).double())
    x = torch.randn(2 + rank, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for context in (contextlib.nullcontext(), _enable(torch.compile(backend="eager"))):
        torch._dynamo.reset()
        model.zero_grad()
        x.grad = None
        loss = model(x).sin().sum()
        with context, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss.backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    return True


def test_compiled_autograd_loses_nothing(ranks: RankPool) -> None:
    assert ranks.run(_by_compiled_autograd, 2) == [True, True]


class Sized(dist.ProcessGroup):
    """A group whose number of ranks changes."""

    num_ranks = 1
    group_name = "sized"  # pyright: ignore[reportAssignmentType]

    def size(self) -> int:
        return self.num_ranks


def test_a_group_may_change_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Sized(0, 1)  # pyright: ignore[reportCallIssue]
    monkeypatch.setattr(dist.distributed_c10d._world, "default_pg", group)
    assert active_group(DEFAULT_GROUP, training=True) == ""
    group.num_ranks = 2
    assert active_group(DEFAULT_GROUP, training=True) == "sized"


class Toggling(nn.Module):
    """A forward whose first convolution decides that the layer behind it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
        self.first = Toggle(self.bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.first(self.bn(self.conv(x))))


class Toggle(nn.Module):
    """Switches a layer on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = (layer,)

    def forward(self, x: Tensor) -> Tensor:
        self.layer[0].training = True
        return x + 0


def _toggled(rank: int, world_size: int) -> int:
    model = bnrewrite.convert(Toggling().double(), passes=())
    model.bn.eval()
    with torch.no_grad(), CountCollectives() as count:
        model(torch.randn(2, 3, 4, dtype=torch.float64))
    return len(count.seen)


def test_a_site_asks_when_it_runs(ranks: RankPool) -> None:
    assert ranks.run(_toggled, 2) == [1, 1]


def _worlds_of_other_sizes(worlds: Worlds, mode: str) -> list[tuple[Tensor, Tensor]]:
    """One compiled model in worlds of 1, 3 and 2 ranks: what it gives, and what eager mode does."""
    torch.manual_seed(0)
    model = bnrewrite.convert(nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()).double(), mode)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    seen = []
    for size in (1, 3, 2):
        if worlds.rank < size:
            worlds.join(f"{size} ranks", list(range(size)))
            torch.manual_seed(worlds.rank)
            x = torch.randn(4, 4, dtype=torch.float64)
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            found = compiled(x)
            model.load_state_dict(state)
            seen.append((found, model(x)))
            dist.barrier()
            dist.destroy_process_group()
    return seen


@pytest.mark.parametrize("mode", ["sync", "shuffle"])
def test_a_compiled_model_follows_the_group_to_another_size(mode: str) -> None:
    for seen in run(_worlds_of_other_sizes, 3, mode, timeout_s=30.0):
        assert seen
        for compiled, eager in seen:
            torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


def _worlds_in_another_order(worlds: Worlds) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = bnrewrite.convert(nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()).double(), "shuffle")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    seen = []
    for members in ([0, 1, 2], [1, 2, 0]):
        worlds.join(str(members), members)
        torch.manual_seed(worlds.rank)
        x = torch.randn(4, 4, dtype=torch.float64)
        seen.append((compiled(x), model(x)))
        dist.barrier()
        dist.destroy_process_group()
    return seen


def test_a_compiled_model_follows_its_rank() -> None:
    for seen in run(_worlds_in_another_order, 3, timeout_s=30.0):
        for compiled, eager in seen:
            torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


def _explicit_group_of_another_size(worlds: Worlds) -> list[tuple[Tensor, Tensor]]:
    """As above, with a group of the same name that is made again."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.BatchNorm1d(4)).double()
    seen, compiled, model = [], None, layer
    for size in (3, 2):
        if worlds.rank < size:
            worlds.join(f"{size} ranks", list(range(size)))
            group: Any = dist.new_group(list(range(size)))
            if compiled is None:
                model = bnrewrite.convert(layer, process_group=group)
                compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.manual_seed(worlds.rank)
            x = torch.randn(4, 4, dtype=torch.float64)
            seen.append((compiled(x), model(x)))
            dist.barrier()
            dist.destroy_process_group()
    if worlds.rank < 2:
        # Without a group the compiled model says so, too.
        for call in (compiled, model):
            with pytest.raises(bnrewrite.GroupError, match="does not exist in this process"):
                call(x)  # pyright: ignore
    return seen


def test_a_compiled_model_follows_an_explicit_group() -> None:
    for seen in run(_explicit_group_of_another_size, 3, timeout_s=30.0):
        assert seen
        for compiled, eager in seen:
            torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_an_error_of_this_device_is_not_said_to_be_of_another_rank(
    kind: type[RuntimeError],
) -> None:
    def begin(_: object) -> None:
        raise kind("of this device")

    group: Any = None
    with pytest.raises(kind, match="of this device"):
        watch.launch("all-reduce", torch.zeros(1), group, (), begin)
