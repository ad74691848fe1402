"""What the test-suites of other synchronized BatchNorms check, as far as no test here did yet.

tests/PEERS.md lists them all, with the test here that proves each.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import bnrewrite
from bnrewrite.sites import schedule
from bnrewrite.sites.floor import is_site, site_state
from tests.models import ResidualNet
from tests.ranks import CountCollectives, RankPool


class Vectors(nn.Module):
    """Two linear layers around a BatchNorm of (N, C) input."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, 8, bias=False)
        self.bn = nn.BatchNorm1d(8, affine=affine)
        self.fc2 = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.bn(self.fc1(x))))


def _images() -> nn.Module:
    layers = (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 2))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the shapes of a sample of its input and output."""

    model: Callable[[], nn.Module]
    sample: tuple[int, ...]
    target: tuple[int, ...]


CASES = {
    "affine": Case(Vectors, (2,), (4,)),
    "no affine": Case(lambda: Vectors(affine=False), (2,), (4,)),
    "a layer alone": Case(lambda: nn.BatchNorm1d(2), (2,), (2,)),
    "channels-last": Case(_images, (2, 5, 4), (4, 2, 1)),
}

SIZES = {"even": [2, 2], "one each": [1, 1], "uneven": [2, 3, 4]}


def _five_steps(
    name: str, total: int, rows: slice, start: Callable[[nn.Module], nn.Module], scale: float
) -> list[Tensor]:
    """Parameters and buffers after five steps of descent on rows of a global batch."""
    case = CASES[name]
    torch.manual_seed(1)
    model = case.model().double()
    wrapped = start(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(5):
        torch.manual_seed(step)
        x = torch.randn(total, *case.sample, dtype=torch.float64)
        target = torch.randn(total, *case.target, dtype=torch.float64)
        if x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = (wrapped(x[rows]) - target[rows]).square().sum()
        (scale * loss).backward()
        optimizer.step()
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


def _rank_of_five(
    rank: int, world_size: int, name: str, sizes: list[int], view: bool
) -> list[Tensor]:
    def start(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(bnrewrite.convert(model), gradient_as_bucket_view=view)

    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    # DDP averages over the ranks; the loss is a sum over samples.
    return _five_steps(name, sum(sizes), rows, start, world_size)


@pytest.mark.parametrize("view", [False, True], ids=["copied", "bucket view"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_five_steps_under_ddp(name: str, sizes: str, view: bool, ranks: RankPool) -> None:
    parts = SIZES[sizes]
    expected = _five_steps(name, sum(parts), slice(None), lambda model: model, 1.0)
    for state in ranks.run(_rank_of_five, len(parts), name, parts, view):
        for ours, theirs in zip(state, expected, strict=True):
            # Sums in another order: 1e-16 a step, amplified by rstd.
            assert (ours - theirs).abs().max() <= 1e-10 * max(float(theirs.abs().max()), 1.0)


LAYERS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _parity(rank: int, world_size: int, num_dims: int) -> list[Tensor | None]:
    bn = bnrewrite.convert(LAYERS[num_dims](3))
    x, grad = _global(num_dims)
    x = x[2 * rank : 2 * rank + 2].requires_grad_()
    y = DistributedDataParallel(bn)(x)
    y.backward(grad[2 * rank : 2 * rank + 2])
    assert bn.weight.grad is not None
    assert bn.bias.grad is not None
    return [y.detach(), x.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var]


def _global(num_dims: int) -> tuple[Tensor, Tensor]:
    """Four samples, of which the first rank's are all zero."""
    torch.manual_seed(num_dims)
    x, grad = torch.randn(2, 4, 3, *[4] * num_dims)
    x[:2] = 0
    return x, grad


@pytest.mark.parametrize("num_dims", [0, 1, 2, 3])
def test_a_lone_layer_with_a_rank_of_zeros(num_dims: int, ranks: RankPool) -> None:
    x, grad = _global(num_dims)
    bn = LAYERS[num_dims](3)
    x.requires_grad_()
    y = bn(x)
    y.backward(grad)
    results = ranks.run(_parity, 2, num_dims)
    joined = [torch.cat([result[i] for result in results]) for i in (0, 1)]
    joined += [torch.stack([result[i] for result in results]).mean(0) for i in (2, 3, 4, 5)]
    # DDP averages gradients.
    assert bn.weight.grad is not None
    assert bn.bias.grad is not None
    expected = [y, x.grad, bn.weight.grad / 2, bn.bias.grad / 2, bn.running_mean, bn.running_var]
    for ours, theirs in zip(joined, expected, strict=True):
        # float32, sums of up to 256 values: some rounding errors of 1e-7.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def _in_training_only(rank: int, world_size: int) -> list[int]:
    model = bnrewrite.convert(ResidualNet())
    model(torch.randn(2, 3, 8, 8))
    model.eval()
    # Of one rank alone: with a collective in it this would wait for the other.
    with CountCollectives() as seen, pytest.MonkeyPatch.context() as patch:
        # It asks the other one, which does not answer.
        patch.setattr(schedule, "_PATIENCE_IN_BACKWARD_S", 0.5)
        if rank == 0:
            model(torch.randn(2, 3, 8, 8)).sum().backward()
    evaluated = len(seen.seen)
    model.train()
    with CountCollectives() as seen:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    return [evaluated, len(seen.seen)]


def test_evaluation_communicates_nothing_and_training_does_again(ranks: RankPool) -> None:
    for evaluated, trained in ranks.run(_in_training_only, 2):
        assert evaluated == 0
        assert trained > 0


class _OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, None, None, self.weight, self.bias, training=True)


class _Untraceable(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        if input.sum() > 1e9:
            return input
        return F.batch_norm(input, None, None, self.weight, self.bias, training=True)


class _OnTheirOwn(nn.Module):
    """Sites that take the statistics of the batch in evaluation, too, outside of graphs."""

    num_sites = 2
    own_forward: type[nn.BatchNorm2d] = _Untraceable

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3, track_running_stats=False)
        self.own = self.own_forward(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.bn(x)) if x.sum() < 1e9 else x


class _InAGraph(_OnTheirOwn):
    """The same, and a call, in a graph."""

    num_sites = 3
    own_forward = _OwnForward

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.own(self.bn(x)), None, None, training=True)


def _statistics(rank: int, world_size: int, kind: type[_OnTheirOwn]) -> list[list[float]]:
    model = bnrewrite.convert(kind())
    x = torch.randn(2, 3, 4, 4) * (1 + rank)
    found = []
    for training in (True, False):
        model.train(training)
        with CountCollectives() as seen:
            y = model(x)
        found.append([len(seen.seen), (y - kind()(x)).abs().max().item()])
    return found


@pytest.mark.parametrize("kind", [_OnTheirOwn, _InAGraph])
def test_batch_statistics_are_those_of_the_rank_in_evaluation(
    kind: type[_OnTheirOwn], ranks: RankPool
) -> None:
    for (trained, differs), (evaluated, rounding) in ranks.run(_statistics, 2, kind):
        assert trained == kind.num_sites
        assert differs > 0.01
        assert evaluated == 0
        assert rounding < 1e-5


class _Call(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.bn(x), None, None, training=True)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = _Call()
        self.right = _Call()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x + 1)


def _one_branch_evaluates(rank: int, world_size: int) -> list[tuple[int, bool, bool]]:
    model, plain = bnrewrite.convert(_Branches()), _Branches()
    assert set(bnrewrite.report(model).inlined()) == {"left", "right"}
    x = torch.randn(2, 3, 4, 4) ** 3 * (1 + rank)
    found = []
    for training in (True, False):
        for one in (model, plain):
            one.right.train(training)
        with CountCollectives() as seen:
            results = model(x)
        equal = [torch.allclose(*pair, 1e-4, 1e-4) for pair in zip(results, plain(x), strict=True)]
        found.append((len(seen.seen), *equal))
    return found


def test_a_branch_that_evaluates_leaves_the_other_alone(ranks: RankPool) -> None:
    for found in ranks.run(_one_branch_evaluates, 2):
        assert found == [(2, False, False), (2, False, True)]


def _early(rank: int, world_size: int) -> str:
    model = DistributedDataParallel(bnrewrite.convert(Vectors()))
    try:
        with model.join(throw_on_early_termination=True):
            for _ in range(3 + rank):
                model(torch.randn(2, 2)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_running_out_of_batches_early_raises_on_all_ranks(ranks: RankPool) -> None:
    """DDP's join with ``throw_on_early_termination``, as torch demands for SyncBatchNorm."""
    for message in ranks.run(_early, 2):
        assert "exhausted" in message


def _nested(rank: int, world_size: int) -> set[str]:
    group = dist.new_group([0])
    if rank != 0:
        return set()
    assert isinstance(group, dist.ProcessGroup)
    model = bnrewrite.convert(ResidualNet(), process_group=group)
    # The other rank does not take part.
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    return {site_state(module).group for module in model.modules() if is_site(module)} - {
        group.group_name
    }


def test_a_group_reaches_every_nested_layer(ranks: RankPool) -> None:
    assert ranks.run(_nested, 2) == [set(), set()]


@pytest.mark.parametrize("prefix", ["", "0."])
def test_checkpoints_from_before_the_counter_load(prefix: str) -> None:
    """Without ``num_batches_tracked``, in a state dictionary that carries no version."""
    model = nn.BatchNorm2d(3) if not prefix else nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    old = {
        name: value + 0.5
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    bnrewrite.convert(model)
    model.load_state_dict(old)
    for name, value in model.state_dict().items():
        assert torch.equal(value, old.get(name, torch.tensor(0)))


def test_a_batch_of_more_than_two_to_the_seventeenth_samples() -> None:
    """A size at which launch limits of kernels were once exceeded."""
    x = torch.rand(131070, 1, 1, 1)
    means = [
        bn(x).detach().double().mean().abs()
        for bn in (bnrewrite.convert(nn.BatchNorm2d(1)), nn.BatchNorm2d(1))
    ]
    # Not worse than torch, whose sums of float32 leave some rounding errors.
    assert means[0] <= 2 * means[1] + 1e-7


@pytest.mark.parametrize("mode", ["sync", "local", "frozen"])
def test_flags_and_other_norms_are_kept(mode: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3), nn.BatchNorm1d(3))
    model[0].eval()
    bnrewrite.convert(model, mode)
    assert [module.training for module in model] == [False, True, True]
    assert [is_site(module) for module in model] == [True, False, True]
    assert type(model[1]) is nn.InstanceNorm1d


@pytest.mark.parametrize("grad", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_frozen_keeps_the_dtype_of_half_precision_inputs(dtype: torch.dtype, grad: bool) -> None:
    """With parameters and statistics in float32, under autocast and without."""
    bn = bnrewrite.convert(nn.BatchNorm2d(10), "frozen")
    x = torch.rand(1, 10, 4, 4).to(dtype).requires_grad_(grad)
    assert bn(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert bn(x).dtype == dtype
