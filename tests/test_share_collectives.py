"""Sites that share collectives: rounds, results, order, and what must keep its place."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed.tensor.debug import CommDebugMode

import bnrewrite
from bnrewrite.collectives import is_launch
from tests.models import Block
from tests.parity import assert_same_training
from tests.ranks import SUMS, CountCollectives, RankPool


class Inception(nn.Module):
    """Branches of one, two and three layers, and a pooled one."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.branch1 = self._layers(width, 1)
        self.branch2 = self._layers(width, 2)
        self.branch3 = self._layers(width, 3)
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), self._layers(width, 1))
        self.merge = nn.Conv2d(4 * width, width, 1)

    @staticmethod
    def _layers(width: int, depth: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [
                nn.Conv2d(width, width, 3, 1, 1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.pool(x)]
        return self.merge(torch.cat(branches, 1))


class Twice(nn.Module):
    """Two views through one encoder, as contrastive methods have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.encoder = nn.Sequential(Inception(), Block(4, 4, 1), nn.Flatten())
        self.projector = nn.Sequential(nn.LazyLinear(5), nn.BatchNorm1d(5, affine=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.projector(self.encoder(self.stem(x)))
        second = self.projector(self.encoder(self.stem(x.flip(-1).roll(1, 0) * 2)))
        return first, second


class InPlace(nn.Module):
    """Branches that write into what other branches read, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.left = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.right = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.last = nn.BatchNorm2d(4)
        self.register_buffer("steps", torch.zeros(()))
        self.steps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        before = self.left(x.clone() * self.steps.add(1))
        with_steps = self.steps.add_(1)
        x = x.detach() + before * with_steps
        x += 1
        after = self.right(x * 1)
        view = after.view(after.size(0), -1)
        out = self.last(self.left(x)) + after
        view.mul_(2)
        return out + self.last(after) * self.steps


class Random(nn.Module):
    """Dropout in two branches: the random numbers must come in the order of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        )
        self.middle = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
        self.right = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout2d(0.5))

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        noise = torch.rand_like(left)
        return left + self.middle(x) * F.dropout(self.right(x), 0.3, self.training) + noise


class Listed(nn.Module):
    """A child that is given a list, writes into it, and cannot be traced by itself."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(Block(4, 4, 1) for _ in range(3))

        def forward(self, values: list[Tensor]) -> list[Tensor]:
            for index, branch in enumerate(self.branches):
                values[index] = branch(values[index])
            return values

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.stages = nn.Sequential(self.Branches(), self.Branches())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        first, second, third = self.stages([x, x * 2, x + 1])
        return first + second * third


class Untraceable(nn.Module):
    """One branch cannot be traced; the others share without it."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) if x.sum() > -1e9 else x

    def __init__(self) -> None:
        super().__init__()
        self.odd = self.Odd()
        self.left = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.right = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.odd(x) * self.right(x)


class Chain(nn.Module):
    """Nothing is independent."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def inception() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), Inception())


def twice() -> nn.Module:
    model = Twice()
    model(torch.randn(2, 3, 5, 5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.reset_running_stats()
    return model


ROUNDS: dict[Callable[[], nn.Module], tuple[int, int]] = {
    inception: (3, 7),
    twice: (6, 20),
    InPlace: (4, 5),
    Random: (2, 4),
    Listed: (4, 12),
    Untraceable: (2, 3),
    Chain: (2, 2),
}
"""Collectives forward, which is the length of the longest chain, and evaluations."""


def _input(rank: int, step: int = 0) -> Tensor:
    torch.manual_seed(17 * step + rank)
    return torch.randn(2 + rank, 3, 5, 5, dtype=torch.float64)


def _make(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory().double()


@pytest.mark.parametrize("factory", ROUNDS, ids=lambda factory: factory.__name__)
def test_report_states_the_rounds(factory: Callable[[], nn.Module]) -> None:
    report = bnrewrite.report(bnrewrite.convert(_make(factory)))
    rounds, evaluations = ROUNDS[factory]
    assert (report.collectives_forward, report.collectives_backward) == (rounds, rounds)
    assert report.num_communicating == evaluations
    apart = bnrewrite.report(bnrewrite.convert(_make(factory), passes=()))
    assert apart.collectives_forward >= evaluations if factory is not twice else True


@pytest.mark.parametrize("factory", ROUNDS, ids=lambda factory: factory.__name__)
def test_trains_like_the_unconverted_model(factory: Callable[[], nn.Module]) -> None:
    assert_same_training(factory, lambda n: ((torch.randn(n, 3, 5, 5),), {}))


def _step(model: Callable[..., Any], x: Tensor) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    out = model(x)
    out = torch.cat([one.flatten(1) for one in out], 1) if isinstance(out, tuple) else out
    weight = torch.sin(torch.arange(out.flatten(1).size(1)).to(out))
    (out.flatten(1) * weight).sum().backward()
    return {
        "out": out.detach(),
        "grad": x.grad,
        "parameters": {name: p.grad for name, p in model.named_parameters()},  # pyright: ignore
        "buffers": {name: b.clone() for name, b in model.named_buffers()},  # pyright: ignore
    }


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in _flat(each)]
    return [] if value is None else [value]


def _shared_and_apart(
    rank: int, world_size: int, factory: Callable[[], nn.Module]
) -> tuple[list[int], list[int]]:
    counts = []
    seen: list[list[dict[str, Any]]] = []
    for passes in (None, ()):
        model = bnrewrite.convert(_make(factory), passes=passes)
        steps = []
        for step in range(2):
            with CountCollectives() as count:
                steps.append(_step(model, _input(rank, step)))
            counts.append(len(count.seen))
        seen.append(steps)
    for shared, apart in zip(*seen, strict=True):
        for a, b in zip(_flat(shared), _flat(apart), strict=True):
            # Both sum in the same order within a site, so only gradients that several paths add
            # up may differ, in their last bits.
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    return counts, _counted_by_torch(factory, rank)


def _counted_by_torch(factory: Callable[[], nn.Module], rank: int) -> list[int]:
    if factory in (twice, InPlace):
        # CommDebugMode fails by itself when it sees a module called twice.
        return [ROUNDS[factory][0]]
    model = bnrewrite.convert(_make(factory))
    with CommDebugMode() as comm, torch.no_grad():
        model(_input(rank))
    return [comm.get_total_counts()]


@pytest.mark.parametrize("factory", ROUNDS, ids=lambda factory: factory.__name__)
def test_ranks_issue_the_rounds_and_compute_the_same(
    ranks: RankPool, factory: Callable[[], nn.Module]
) -> None:
    rounds, evaluations = ROUNDS[factory]
    (counts, by_torch), (other, _) = ranks.run(_shared_and_apart, 2, factory)
    assert counts == other == [2 * rounds, 2 * rounds, 2 * evaluations, 2 * evaluations]
    assert by_torch == [rounds]


def _uneven(rank: int, world_size: int, sizes: list[int]) -> dict[str, Any]:
    model = bnrewrite.convert(_make(inception))
    torch.manual_seed(1)
    x = torch.randn(sum(sizes), 3, 5, 5, dtype=torch.float64)
    return _step(model, x.split(sizes)[rank])


@pytest.mark.parametrize("sizes", [[3, 1], [0, 2], [2, 0, 1]], ids=str)
def test_uneven_and_empty_ranks_agree_with_one_process(ranks: RankPool, sizes: list[int]) -> None:
    model = _make(inception)
    torch.manual_seed(1)
    expected = _step(model, torch.randn(sum(sizes), 3, 5, 5, dtype=torch.float64))
    results = ranks.run(_uneven, len(sizes), sizes)
    for key in ("out", "grad"):
        ours = torch.cat([result[key] for result in results])
        torch.testing.assert_close(ours, expected[key], rtol=1e-10, atol=1e-10)
    for name, grad in expected["parameters"].items():
        ours = sum(result["parameters"][name] for result in results)
        torch.testing.assert_close(ours, grad, rtol=1e-9, atol=1e-9)
    for result in results:
        torch.testing.assert_close(result["buffers"], expected["buffers"], rtol=1e-11, atol=1e-11)


def _leaving(rank: int, world_size: int) -> list[int]:
    counts = []
    model = bnrewrite.convert(_make(inception))
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for index in range(len(layers)):
        layers[index].eval()
        with CountCollectives() as count:
            _step(model, _input(rank))
        counts.append(sum(name in SUMS for name, *_ in count.seen))
    return counts


def test_sites_that_evaluate_leave_their_rounds(ranks: RankPool) -> None:
    # In the order of the modules: one layer, two, three, one. The last rounds have most members.
    expected = [2 * n for n in (3, 3, 3, 2, 1, 1, 0)]
    assert ranks.run(_leaving, 2) == [expected] * 2


def _second_order(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x).square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    grad.square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]  # pyright: ignore


def _penalty(rank: int, world_size: int) -> list[list[Tensor]]:
    return [
        _second_order(bnrewrite.convert(_make(inception), passes=passes), _input(rank))
        for passes in (None, ())
    ]


def test_second_derivatives_through_shared_rounds(ranks: RankPool) -> None:
    for shared, apart in ranks.run(_penalty, 2):
        torch.testing.assert_close(shared, apart, rtol=1e-9, atol=1e-9)


def _compiled(rank: int, world_size: int) -> list[int]:
    counts = []

    def boxed(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        counts.append(sum(is_launch(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    model = bnrewrite.convert(_make(inception))
    expected = _step(copy.deepcopy(model), _input(rank))
    found = _step(
        torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=boxed)), _input(rank)
    )
    for key in ("out", "grad", "buffers"):
        for a, b in zip(_flat(found[key]), _flat(expected[key]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    return counts


def test_compiled_graphs_share_too(ranks: RankPool) -> None:
    assert ranks.run(_compiled, 2) == [[3, 3]] * 2


class Functions(nn.Module):
    """Two function calls, the first of which is to stay local."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, None, None, training=True)
        x = F.batch_norm(self.linear(x).tanh(), None, None, training=True)
        return self.bn(x.exp())


class Views(nn.Module):
    """Two views through one encoder that calls functions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Functions()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.encoder(x), self.encoder(x.flip(1).exp())], 1)


class TwoViews(nn.Module):
    """Two blocks of one structure in a forward that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Views()
        self.b = Views()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 1e9:
            return x
        return torch.cat([self.a(x), self.b(x)], 1)


def _modes_of_functions(
    rank: int, world_size: int, make: Callable[[], nn.Module], modes: dict[str, str]
) -> list[Any]:
    """Results and numbers of collectives, with passes and without."""
    found: list[Any] = []
    for passes in (None, ()):
        torch.manual_seed(0)
        model = bnrewrite.convert(make(), modes, passes=passes)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
        with CountCollectives() as counted:
            found.append(model(x).detach())
        found.append(len(counted.seen))
    return found


@pytest.mark.parametrize("local", ["a", "b"])
def test_blocks_whose_function_calls_differ_in_mode_share_no_graph(
    local: str, ranks: RankPool
) -> None:
    modes = {f"{local}.encoder.batch_norm": "local", "*": "sync"}
    results = ranks.run(_modes_of_functions, 2, TwoViews, modes)
    for shared, num_shared, apart, num_apart in results:
        torch.testing.assert_close(shared, apart)
        assert (num_shared, num_apart) == (2 + 3, 4 + 6)


def test_function_calls_of_a_child_keep_their_modes_each_time_it_runs(ranks: RankPool) -> None:
    modes = {"encoder.batch_norm": "local", "*": "sync"}
    results = ranks.run(_modes_of_functions, 2, Views, modes)
    for shared, num_shared, apart, num_apart in results:
        torch.testing.assert_close(shared, apart)
        assert (num_shared, num_apart) == (2, 4)


UNREAD: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "its result": lambda net, y: y,
    "what follows it": lambda net, y: net.act(y) * 2,
    "what it is added to": lambda net, y: y.add_(1).relu_(),
    "more than its value": lambda net, y: y,
}


class Unread(nn.Module):
    """Two branches that share their collective; what one of them computes nobody needs."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        y = UNREAD[self.what](self, self.bn1(self.conv1(x)))
        z = self.bn2(self.conv2(x))
        return z + y.detach() if self.what == "more than its value" else z


def _unread(rank: int, world_size: int, what: str) -> list[list[bool]]:
    found = []
    for passes in ((), None):
        torch.manual_seed(0)
        model = bnrewrite.convert(Unread(what), passes=passes)
        report = bnrewrite.report(model)
        assert report.collectives_forward == (2 if passes == () else 1)
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
        found.append([p.grad is not None for p in model.parameters()])
    return found


@pytest.mark.parametrize("what", UNREAD)
def test_what_nobody_reads_gets_no_gradient(what: str, ranks: RankPool) -> None:
    """An optimizer moves a parameter with a gradient of zero, by weight decay and momentum."""
    for apart, shared in ranks.run(_unread, 2, what):
        assert apart == [False] * 4 + [True] * 4
        assert shared == apart


def _not_in_the_loss(rank: int, world_size: int, leaf: bool) -> list[list[bool]]:
    found = []
    for passes in ((), None):
        torch.manual_seed(0)
        model: Any = bnrewrite.convert(_Both(leaf), passes=passes)
        model(torch.randn(2, 3, 5, 5))[1].square().sum().backward()
        found.append(
            [p.grad is not None for p in (*model.bn1.parameters(), *model.bn2.parameters())]
        )
    return found


class _Both(nn.Module):
    def __init__(self, leaf: bool) -> None:
        super().__init__()
        self.conv: Any = nn.Identity() if leaf else nn.Conv2d(3, 3, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return self.bn1(x), self.bn2(x * x)


@pytest.mark.parametrize("leaf", [False, True])
def test_a_site_that_is_not_in_the_loss_gets_no_gradient(leaf: bool, ranks: RankPool) -> None:
    for apart, shared in ranks.run(_not_in_the_loss, 2, leaf):
        assert apart == [False, False, True, True]
        assert shared == apart


class _Towers(nn.Module):
    """Two towers that have nothing in common, as those of users and items."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        self.items = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        return self.users(users), self.items(items)


def _one_loss_after_the_other(rank: int, world_size: int, how: str) -> list[list[Tensor]]:
    """Gradients with one collective per layer, and shared."""
    found = []
    for passes in ((), None):
        torch.manual_seed(0)
        model = bnrewrite.convert(_Towers(), passes=passes)
        assert bnrewrite.report(model).collectives_backward == (2 if passes == () else 1)
        users, items = model(torch.randn(3 + rank, 3), torch.randn(3 + rank, 5))
        first, second = users.square().sum(), items.square().sum()
        if how == "together":
            (first + second).backward()
        else:
            first.backward(retain_graph=how == "keeping the graph")
            second.backward()
        found.append([p.grad for p in model.parameters()])
    return found


@pytest.mark.parametrize("how", ["together", "keeping the graph"])
def test_losses_of_sites_that_share(how: str, ranks: RankPool) -> None:
    for apart, shared in ranks.run(_one_loss_after_the_other, 2, how):
        torch.testing.assert_close(shared, apart)


def _freed(rank: int, world_size: int) -> str:
    with pytest.raises(bnrewrite.BackwardError) as error:
        _one_loss_after_the_other(rank, world_size, "one after the other")
    return str(error.value)


def test_a_backward_that_another_one_has_freed_names_the_sites(ranks: RankPool) -> None:
    """Without sharing, the towers have graphs of their own, as in torch."""
    for message in ranks.run(_freed, 2):
        assert message.startswith("users.1, items.1: these BatchNorm layers share a collective")
        assert "retain_graph=True" in message


def test_a_second_backward_of_one_loss_is_refused_by_torch() -> None:
    loss = bnrewrite.convert(_Towers())(torch.randn(3, 3), torch.randn(3, 5))[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time") as error:
        loss.backward()
    assert not isinstance(error.value, bnrewrite.BackwardError)


class _Frozen(nn.Module):
    """An encoder, and a target whose parameters are frozen, in one forward without ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.online = Block(3, 4, 1)
        self.target = Block(3, 4, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.online(x), self.target(x)


def _of_a_frozen_branch(rank: int, world_size: int, form: str) -> tuple[list[bool], list[Any]]:
    """Whether results need gradients, and those of a loss that keeps targets for the next step."""
    torch.manual_seed(0)
    passes = () if form == "apart" else None
    model = bnrewrite.convert(_Frozen(), passes=passes)
    call = torch.compile(model, backend="aot_eager") if form == "compiled" else model
    kept, needed = torch.zeros(2, 4, 4, 4), []
    for step in range(2):
        torch.manual_seed(2 * step + rank)
        online, target = call(torch.randn(2, 3, 4, 4))
        needed += [online.requires_grad, target.requires_grad]
        (online * (target + kept)).sum().backward()
        kept[:] = target
    return needed, [p.grad for p in model.online.parameters()]


def test_a_frozen_branch_needs_no_gradient_because_another_shares_with_it(ranks: RankPool) -> None:
    _, expected = zip(*ranks.run(_of_a_frozen_branch, 2, "apart"), strict=True)
    for form in ("shared", "compiled"):
        needed, found = zip(*ranks.run(_of_a_frozen_branch, 2, form), strict=True)
        assert needed == ([True, False] * 2,) * 2
        torch.testing.assert_close(found, expected)


def _written_to(rank: int, world_size: int) -> str:
    model = bnrewrite.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    x = model[0](torch.randn(3, 3))
    y = model[1](x)
    x.mul_(2)
    with pytest.raises(bnrewrite.BackwardError) as error:
        y.square().sum().backward()
    return str(error.value)


def test_an_input_that_was_written_to_names_the_site(ranks: RankPool) -> None:
    for message in ranks.run(_written_to, 2):
        assert message.startswith("1: ")
        assert "modified by an inplace operation" in message
