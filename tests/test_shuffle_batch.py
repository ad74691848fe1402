"""``shuffle_batch``: samples travel, come back, and take their gradients along."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import bnrewrite
from tests.ranks import RankPool


def _numbered(rank: int, num: int) -> Tensor:
    """Samples that say where they came from: 100 * rank + index."""
    return (100.0 * rank + torch.arange(num)).view(num, 1, 1).repeat(1, 2, 3)


def _there_and_back(rank: int, world_size: int, num: int) -> tuple[list[float], list[float]]:
    x = _numbered(rank, num)
    with CommDebugMode() as comm:
        shuffled, restore = bnrewrite.shuffle_batch(x)
        features = restore(shuffled[:, 0] * 2)
    # The seed and the sizes, and one all-to-all each way: nothing gathers samples.
    assert {str(op): count for op, count in comm.get_comm_counts().items()} == {
        "c10d_functional.all_gather_into_tensor": 1,
        "c10d_functional.all_to_all_single": 2,
    }
    assert shuffled.shape == x.shape
    assert torch.equal(features, x[:, 0] * 2)
    assert torch.equal(restore(shuffled), x)
    again, _ = bnrewrite.shuffle_batch(x)
    return shuffled[:, 0, 0].tolist(), again[:, 0, 0].tolist()


@pytest.mark.parametrize(("world_size", "num"), [(2, 7), (3, 1), (4, 16)])
def test_samples_are_permuted_across_ranks_and_put_back(
    ranks: RankPool, world_size: int, num: int
) -> None:
    results = ranks.run(_there_and_back, world_size, num)
    everything = [v for rank in range(world_size) for v in _numbered(rank, num)[:, 0, 0].tolist()]
    for which in range(2):
        assert sorted(v for result in results for v in result[which]) == everything
    if num > 1:
        flat = [[v for result in results for v in result[which]] for which in range(2)]
        assert flat[0] != everything
        assert flat[0] != flat[1], "the permutation is not a new one"
        assert any(v >= 100 for v in results[0][0]), "nothing crossed ranks"


def _gradients(rank: int, world_size: int) -> list[Tensor]:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    x.requires_grad_()
    shuffled, restore = bnrewrite.shuffle_batch(x, generator=torch.Generator().manual_seed(3))
    scale = 1.0 + rank
    y = restore((shuffled**3 * scale).sum(1))
    (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad is not None
    return [x.detach(), shuffled.detach(), y.detach(), grad.detach(), x.grad]


def test_gradients_travel_back_to_any_order(ranks: RankPool) -> None:
    results = ranks.run(_gradients, 3)
    x = torch.cat([result[0] for result in results]).requires_grad_()
    shuffled = torch.cat([result[1] for result in results])
    # Where each sample was evaluated, from the values themselves.
    place = (x.detach()[:, None, :] == shuffled).all(2).long().argmax(1)
    y = (x**3 * (1.0 + place // 5)[:, None]).sum(1)
    (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad is not None
    for index, exact in enumerate((y, grad, x.grad)):
        ours = torch.cat([result[index + 2] for result in results])
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def _generators(rank: int, world_size: int) -> list[list[float]]:
    x = _numbered(rank, 8)
    found = []
    for seed in (1, 1, 1 + rank, 2):
        generator = torch.Generator().manual_seed(seed)
        found.append(bnrewrite.shuffle_batch(x, generator=generator)[0][:, 0, 0].tolist())
    return found


def test_the_generator_of_the_first_rank_counts(ranks: RankPool) -> None:
    for same, again, differing, other in ranks.run(_generators, 3):
        assert same == again == differing
        assert same != other


DIFFERENT = {
    "samples": ((2, 2, 3), torch.float32, (3, 2, 3), torch.float32),
    "shape of a sample": ((4, 2, 3), torch.float32, (4, 3, 2), torch.float32),
    "number of dimensions": ((4, 6), torch.float32, (4, 2, 3), torch.float32),
    "dtype of one size": ((2, 3), torch.float32, (2, 3), torch.int32),
    "dtype of another size": ((2, 3), torch.float32, (2, 3), torch.float64),
    "no samples on one": ((2, 3), torch.float32, (0, 3), torch.float32),
    "no samples at all": ((0, 3), torch.float32, (0, 4), torch.float32),
}


def _different(rank: int, world_size: int, what: str) -> None:
    *most, other_shape, other_dtype = DIFFERENT[what]
    x = torch.ones(most[0], dtype=most[1])
    other = torch.ones(other_shape, dtype=other_dtype)
    words = [f"{one.dtype} {tuple(one.shape)}".removeprefix("torch.") for one in (x, other)]
    message = f"({words[0]} on rank 0, 1; {words[1]} on rank 2); this is rank {rank}."
    generator = torch.Generator().manual_seed(rank)
    before = torch.get_rng_state(), generator.get_state()
    for given in (None, generator):
        with pytest.raises(ValueError, match=re.escape(message)):
            bnrewrite.shuffle_batch(other if rank == 2 else x, generator=given)
    assert all(map(torch.equal, (torch.get_rng_state(), generator.get_state()), before))
    dist.barrier()


@pytest.mark.parametrize("what", DIFFERENT)
def test_batches_that_differ_are_an_error_on_all_ranks(ranks: RankPool, what: str) -> None:
    ranks.run(_different, 3, what)


def _many_dimensions(rank: int, world_size: int) -> None:
    shape = [2, *[1] * 48]
    x = torch.arange(2.0).add(10 * rank).view(shape)
    shuffled, restore = bnrewrite.shuffle_batch(x)
    assert torch.equal(restore(shuffled), x)
    shape[-1] += rank
    with pytest.raises(ValueError, match=r"different batches \(float32 \(2, 1, 1, 1, 1, 1, 1, 1,"):
        bnrewrite.shuffle_batch(torch.ones(shape))


def test_batches_of_many_dimensions_are_compared_to_the_last(ranks: RankPool) -> None:
    ranks.run(_many_dimensions, 2)


def _wrong_features(rank: int, world_size: int) -> None:
    x = _numbered(rank, 2)
    _, restore = bnrewrite.shuffle_batch(x)
    with pytest.raises(ValueError, match=r"restore: features has shape \(3, 4\)"):
        restore(torch.rand(3, 4))


def test_features_of_another_number_are_an_error(ranks: RankPool) -> None:
    ranks.run(_wrong_features, 3)


def _sub_groups(rank: int, world_size: int) -> list[float]:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[rank % 2]
    assert isinstance(group, dist.ProcessGroup)
    return bnrewrite.shuffle_batch(_numbered(rank, 6), group)[0][:, 0, 0].tolist()


def test_sub_groups_keep_their_samples(ranks: RankPool) -> None:
    for rank, values in enumerate(ranks.run(_sub_groups, 4)):
        assert {int(value) // 100 for value in values} == {rank % 2, rank % 2 + 2}


DTYPES = (torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)


def _dtypes(rank: int, world_size: int) -> None:
    for dtype in DTYPES:
        x = torch.arange(6).add(rank).view(3, 2).to(dtype)
        shuffled, restore = bnrewrite.shuffle_batch(x)
        assert shuffled.dtype == dtype
        assert torch.equal(restore(shuffled), x)
        assert torch.equal(restore(shuffled[:, 0]), x[:, 0])
    for empty in (torch.rand(0, 3), torch.rand(3, 0)):
        shuffled, restore = bnrewrite.shuffle_batch(empty)
        assert restore(shuffled).shape == empty.shape


def test_every_dtype_and_empty_batches(ranks: RankPool) -> None:
    ranks.run(_dtypes, 2)


def test_one_process_keeps_its_batch() -> None:
    x = torch.rand(4, 3, requires_grad=True)
    shuffled, restore = bnrewrite.shuffle_batch(x)
    assert shuffled is x
    assert restore(shuffled) is x
    with pytest.raises(ValueError, match="4 samples"):
        restore(x[:3])
    with pytest.raises(TypeError, match=r"features must be a tensor \(N, \*\).* is list"):
        restore([x])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"x must be a tensor \(N, \*\) of samples"):
        bnrewrite.shuffle_batch(torch.tensor(1.0))


@pytest.mark.parametrize("wrong", [{"group": "0"}, {"group": 3}, {"generator": 3}], ids=str)
def test_wrong_arguments_are_named_and_draw_nothing(wrong: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    ((name, value),) = wrong.items()
    message = rf"{name} must be .*{type(value).__name__} \({value!r}\)"
    with pytest.raises(TypeError, match=message):
        bnrewrite.shuffle_batch(torch.rand(2, 3, generator=torch.Generator()), **wrong)
    assert torch.equal(torch.get_rng_state(), before)
