"""Mode ``shuffle`` at every kind of site: functional, subclass, on the floor, untracked."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F

import bnrewrite
from bnrewrite import Shuffle
from tests.ranks import RankPool
from tests.shuffled import make_input, random_peers, ring


class Functional(nn.Module):
    """Two functional sites: they have no counter of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.mean, self.var, training=self.training)  # pyright: ignore
        return F.batch_norm(x.tanh(), None, None, training=True)


class Doubled(nn.BatchNorm2d):
    """A subclass that adds something to torch's forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Branches(nn.Module):
    """A forward that cannot be traced, so that its site is on the floor."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) if x.sum() > -1e9 else x


def _kind(rank: int, world_size: int, kind: str, mode: Shuffle) -> tuple[Tensor, Tensor]:
    make = {
        "functional": Functional,
        "subclass": lambda: Doubled(3),
        "floor": Branches,
        "untracked": lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)),
    }[kind]
    model = bnrewrite.convert(make().double(), mode)
    x = make_input(rank, 3)
    y = model(x)
    with CommDebugMode() as comm:
        model.eval()(x)
    assert comm.get_total_counts() == 0
    return x.detach(), y.detach()


def _normalized(xs: list[Tensor], peers: list[int]) -> list[Tensor]:
    stats = [torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True) for x in xs]
    return [(x - stats[p][1]) / (stats[p][0] + 1e-5).sqrt() for x, p in zip(xs, peers, strict=True)]


@pytest.mark.parametrize("schedule", ["ring", "random"])
@pytest.mark.parametrize("kind", ["functional", "subclass", "floor", "untracked"])
def test_every_kind_of_site_is_shuffled(ranks: RankPool, kind: str, schedule: str) -> None:
    mode = Shuffle(schedule)  # pyright: ignore[reportArgumentType]
    results = ranks.run(_kind, 3, kind, mode)
    xs, ys = [x for x, _ in results], [y for _, y in results]
    names = {"subclass": "", "floor": "bn"}
    if schedule == "ring":
        candidates = [ring(3)("", 0)]
    elif kind in names:
        candidates = [random_peers(3)(names[kind], 0)]
    else:
        # Without a counter of steps the digest of the statistics chooses one of the two cycles.
        candidates = [[1, 2, 0], [2, 0, 1]]
    outcomes = []
    for peers in candidates:
        expected = _normalized(xs, peers)
        if kind != "functional":
            outcomes.append([y * (2 if kind == "subclass" else 1) for y in expected])
            continue
        for second in candidates:
            outcomes.append(_normalized([y.tanh() for y in expected], second))
    assert any(
        all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(ys, outcome, strict=True))
        for outcome in outcomes
    )


class _Views(nn.Module):
    """Two sites of the same values, without counters of steps."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (
            F.batch_norm(x, None, None, training=True),
            F.batch_norm(x, None, None, training=True),
        )


def _views(rank: int, world_size: int) -> list[tuple[Tensor, ...]]:
    model = bnrewrite.convert(_Views(), Shuffle("random"))
    xs = [make_input(rank, 3, step).detach() for step in range(16)]
    return [(x, *model(x)) for x in xs]


def test_random_schedules_without_a_counter_change_with_site_and_step(ranks: RankPool) -> None:
    cycles = [[1, 2, 0], [2, 0, 1]]
    seen: list[list[int]] = [[], []]
    for step in zip(*ranks.run(_views, 3), strict=True):
        xs, *results = zip(*step, strict=True)
        expected = [torch.stack(_normalized([*xs], peers)) for peers in cycles]
        for site, ys in enumerate(results):
            equal = [torch.allclose(torch.stack(ys), one, rtol=1e-9) for one in expected]
            assert sum(equal) == 1
            seen[site].append(equal.index(True))
    # One cycle at all 16 steps, or the same two times, has a probability of 2^-15.
    assert set(seen[0]) == set(seen[1]) == {0, 1}
    assert seen[0] != seen[1]
