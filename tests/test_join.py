"""Ranks with different numbers of batches under ``DistributedDataParallel.join()``."""

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnrewrite
from tests.models import ResidualNet, perturb
from tests.ranks import RankPool


class Wide(ResidualNet):
    """Large enough for several gradient buckets, with a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__(width=8)
        self.unused = nn.Parameter(torch.ones(3))


def _net(kind: type[nn.Module] = ResidualNet) -> Any:
    torch.manual_seed(0)
    return perturb(kind().double())


def _x(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    size = 2 + (rank + step) % 3
    return torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64) + rank


def _loss(y: Tensor) -> Tensor:
    return (y * torch.sin(torch.arange(3.0))).square().sum()


def _rank(rank: int, world_size: int, lengths: list[int], how: str) -> list[Tensor]:
    kind = Wide if how == "unused parameters" else ResidualNet
    model = bnrewrite.convert(_net(kind), passes=() if how == "no passes" else None)
    if how == "compiled":
        model.compile(backend="aot_eager", fullgraph=True)
    ddp = DistributedDataParallel(
        model,
        # Small buckets, which lie between the collectives of BatchNorm.
        bucket_cap_mb=None if how == "compiled" else 0.001,  # pyright: ignore[reportArgumentType]
        find_unused_parameters=how == "unused parameters",
        static_graph=how == "static graph",
        gradient_as_bucket_view=how == "views",
    )
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.02)
    if how == "after a check by hand":
        bnrewrite.check(model)
    if how == "second epoch":
        _loss(ddp(_x(rank, 99))).mul(world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    with ddp.join(divide_by_initial_world_size=True):
        for step in range(lengths[rank]):
            if how == "no_sync" and step % 2 == 0:
                with ddp.no_sync():
                    _loss(ddp(_x(rank, step))).mul(world_size).backward()
                continue
            _loss(ddp(_x(rank, step))).mul(world_size).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [tensor.detach() for tensor in model.state_dict().values()]


def _expected(lengths: list[int], how: str) -> list[Tensor]:
    model = _net(Wide if how == "unused parameters" else ResidualNet)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    if how == "second epoch":
        _loss(model(torch.cat([_x(rank, 99) for rank in range(len(lengths))]))).backward()
        optimizer.step()
        optimizer.zero_grad()
    for step in range(max(lengths)):
        x = [_x(rank, step) for rank, length in enumerate(lengths) if step < length]
        _loss(model(torch.cat(x))).backward()
        if how == "no_sync" and step % 2 == 0:
            continue
        optimizer.step()
        optimizer.zero_grad()
    return [tensor.detach() for tensor in model.state_dict().values()]


def _assert_equal(results: list[list[Tensor]], expected: list[Tensor]) -> None:
    for result in results:
        for ours, theirs in zip(result, expected, strict=True):
            # float64 sums in another order.
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "lengths", [[4, 1], [1, 4], [2, 5, 3], [3, 3]], ids=lambda lengths: str(lengths)
)
def test_training_equals_one_process_on_what_is_left(ranks: RankPool, lengths: list[int]) -> None:
    """The final model, buffers included, is the same on all ranks, also on those that were done."""
    _assert_equal(ranks.run(_rank, len(lengths), lengths, ""), _expected(lengths, ""))


@pytest.mark.parametrize(
    "how",
    [
        "no passes",
        "unused parameters",
        "static graph",
        "views",
        "second epoch",
        "compiled",
        "after a check by hand",
    ],
)
def test_with_other_options(ranks: RankPool, how: str) -> None:
    _assert_equal(ranks.run(_rank, 2, [4, 2], how), _expected([4, 2], how))


def test_accumulation_while_others_are_done(ranks: RankPool) -> None:
    lengths = [6, 2]
    _assert_equal(ranks.run(_rank, 2, lengths, "no_sync"), _expected(lengths, "no_sync"))


class Rigid(ResidualNet):
    """A model that takes no empty batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, *x.shape[1:]) if len(x) else x.view(-1, 0))


def _rigid(rank: int, world_size: int) -> str:
    ddp = DistributedDataParallel(bnrewrite.convert(_net(Rigid)))
    try:
        with ddp.join():
            for step in range(3 - 2 * rank):
                _loss(ddp(_x(rank, step))).backward()
    except bnrewrite.BnRewriteError as error:
        return str(error)
    return "nothing was raised"


def test_a_model_that_takes_no_empty_batch_is_an_error_with_a_way_out(ranks: RankPool) -> None:
    other, done = ranks.run(_rigid, 2)
    assert "Rigid on an empty batch" in done
    assert "the same number of batches" in done
    assert "died, stalled or left" in other


def _copied(rank: int, world_size: int) -> None:
    ddp: Any = DistributedDataParallel(bnrewrite.convert(_net()))
    _loss(ddp(_x(rank, 0))).backward()
    for other in (copy.deepcopy(ddp), pickle.loads(pickle.dumps(ddp))):
        with other.join():
            for step in range(2 - rank):
                _loss(other(_x(rank, step))).backward()
    del other
    alive = weakref.ref(ddp)
    del ddp
    assert alive() is None


def test_ddp_copies_pickles_and_goes_as_before(ranks: RankPool) -> None:
    ranks.run(_copied, 2)
