"""The harness itself: what it reports when a rank fails or hangs."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankPool


def _sum_of_ranks(rank: int, world_size: int) -> float:
    value = torch.tensor([float(rank)])
    dist.all_reduce(value)
    return value.item()


def _rank_1_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("this rank is wrong")
    dist.barrier()


def _rank_0_sleeps(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(60)


@pytest.mark.parametrize("world_size", [2, 4, 3])
def test_worlds_of_several_sizes_follow_each_other(ranks: RankPool, world_size: int) -> None:
    total = world_size * (world_size - 1) / 2
    assert ranks.run(_sum_of_ranks, world_size) == [total] * world_size


def test_a_failing_rank_shows_its_traceback_and_the_next_run_works(ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed(.|\n)*this rank is wrong"):
        ranks.run(_rank_1_raises, 2)
    assert ranks.run(_sum_of_ranks, 2) == [1.0, 1.0]


def test_a_hanging_rank_is_a_failure_with_its_stack(ranks: RankPool) -> None:
    ranks.run(_sum_of_ranks, 2)
    with pytest.raises(AssertionError, match=r"did not finish within(.|\n)*_rank_0_sleeps"):
        ranks.run(_rank_0_sleeps, 2, timeout_s=2)
