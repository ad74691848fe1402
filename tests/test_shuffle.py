"""Mode ``shuffle``: values, gradients and buffers against a simulation of all ranks."""

import itertools

import pytest
import torch
from torch import nn

import bnrewrite
from bnrewrite import Shuffle, permutations, reference
from tests.ranks import RankPool
from tests.shuffled import (
    Peers,
    assert_close,
    converted_step,
    loss_of,
    make_input,
    make_model,
    random_peers,
    ring,
    simulate,
)


def _compare(
    ranks: RankPool, mode: Shuffle | str, sizes: list[int], peers: Peers, num_steps: int = 1
) -> None:
    """Every rank's output, gradients and buffers agree with the simulation."""
    options = mode if isinstance(mode, Shuffle) else Shuffle()
    results = ranks.run(converted_step, len(sizes), mode, sizes, num_steps)
    model = make_model()
    # Buffers of the last step alone: earlier steps are compared through their counter only.
    xs = [make_input(rank, size, num_steps - 1) for rank, size in enumerate(sizes)]
    ys, buffers = simulate(
        model,
        xs,
        peers,
        step=num_steps - 1,
        detach=options.backward == "detach",
        follow_group=options.running == "group",
    )
    torch.stack([loss_of(y) for y in ys]).sum().backward()
    for rank, result in enumerate(results):
        assert_close(result["values"]["y"], ys[rank], what=f"output of rank {rank}")
        x_grad = xs[rank].grad
        assert x_grad is not None
        assert_close(result["values"]["x.grad"], x_grad, what=f"gradient of rank {rank}")
        if num_steps == 1:
            for name, buffer in buffers[rank].items():
                assert_close(result["buffers"][name], buffer, what=f"{name} of rank {rank}")
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    # A bias in front of a site has a gradient of nothing but rounding errors.
    scale = max(grad.abs().max().item() for grad in grads)
    for name, parameter in model.named_parameters():
        total = torch.stack([result["grads"][name] for result in results]).sum(0)
        assert parameter.grad is not None
        assert_close(total, parameter.grad, what=name, scale=scale)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_ring_is_the_true_gradient(ranks: RankPool, world_size: int) -> None:
    sizes = [2, 3, 1, 4, 2, 1, 5, 3][:world_size]
    _compare(ranks, "shuffle", sizes, ring(world_size))


@pytest.mark.parametrize("running", ["peer", "group"])
@pytest.mark.parametrize("backward", ["exact", "detach"])
@pytest.mark.parametrize("schedule", ["ring", "random"])
def test_every_option_agrees_with_the_simulation(
    ranks: RankPool, schedule: str, backward: str, running: str
) -> None:
    mode = Shuffle(schedule, backward, running, seed=5)  # pyright: ignore[reportArgumentType]
    peers = ring(3) if schedule == "ring" else random_peers(3, seed=5)
    _compare(ranks, mode, [3, 1, 2], peers)


def test_random_schedule_follows_the_step_counter(ranks: RankPool) -> None:
    _compare(ranks, Shuffle("random", seed=1), [2, 2, 2, 2], random_peers(4, seed=1), num_steps=4)


@pytest.mark.parametrize("sizes", [[0, 2, 3], [2, 0, 0], [0, 0, 3, 1]], ids=str)
@pytest.mark.parametrize(
    "mode",
    [Shuffle(), Shuffle(backward="detach"), Shuffle(running="group"), Shuffle("random")],
    ids=["ring", "detach", "group", "random"],
)
def test_a_rank_whose_peer_is_empty_uses_its_own_statistics(
    ranks: RankPool, sizes: list[int], mode: Shuffle
) -> None:
    world_size = len(sizes)
    peers = ring(world_size) if mode.schedule == "ring" else random_peers(world_size)
    if mode.schedule == "random":
        _compare_values_only(ranks, mode, sizes, peers)
    else:
        _compare(ranks, mode, sizes, peers)


def _compare_values_only(ranks: RankPool, mode: Shuffle, sizes: list[int], peers: Peers) -> None:
    """As ``_compare``, but for buffers: an empty rank with an empty peer follows the group."""
    results = ranks.run(converted_step, len(sizes), mode, sizes)
    xs = [make_input(rank, size) for rank, size in enumerate(sizes)]
    ys, _ = simulate(make_model(), xs, peers)
    torch.stack([loss_of(y) for y in ys]).sum().backward()
    for rank, result in enumerate(results):
        x_grad = xs[rank].grad
        assert x_grad is not None
        assert_close(result["values"]["y"], ys[rank])
        assert_close(result["values"]["x.grad"], x_grad)
        assert result["buffers"]["0.num_batches_tracked"] == 1
        assert all(buffer.isfinite().all() for buffer in result["buffers"].values())


@pytest.mark.parametrize("mode", [Shuffle(), Shuffle("random"), Shuffle(running="group")], ids=str)
def test_nothing_is_updated_if_all_ranks_are_empty(ranks: RankPool, mode: Shuffle) -> None:
    before = dict(make_model().named_buffers())
    for result in ranks.run(converted_step, 2, mode, [0, 0]):
        for name, buffer in result["buffers"].items():
            assert torch.equal(buffer, before[name])
        assert all(not grad.any() for grad in result["grads"].values())


def _untracked(rank: int, world_size: int, mode: Shuffle) -> list[torch.Tensor]:
    model = make_model()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
    bnrewrite.convert(model, mode)(make_input(rank, 2))
    return list(model.buffers())


@pytest.mark.parametrize("mode", [Shuffle(), Shuffle("random"), Shuffle(running="group")], ids=str)
def test_nothing_is_updated_that_is_not_tracked(ranks: RankPool, mode: Shuffle) -> None:
    before = list(make_model().buffers())
    for buffers in ranks.run(_untracked, 2, mode):
        assert all(map(torch.equal, buffers, before))


def _with_penalty(rank: int, world_size: int, mode: Shuffle) -> tuple[torch.Tensor, torch.Tensor]:
    model = bnrewrite.convert(make_model(), mode)
    x = make_input(rank, 2 + rank)
    (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    (grad.square().sum()).backward()
    assert x.grad is not None
    return grad.detach(), x.grad


@pytest.mark.parametrize(
    "mode",
    [Shuffle(), Shuffle("random", seed=2), Shuffle(backward="detach")],
    ids=["ring", "random", "detach"],
)
def test_gradient_penalty(ranks: RankPool, mode: Shuffle) -> None:
    """Second derivatives: each rank penalizes the gradient of the loss of all ranks."""
    results = ranks.run(_with_penalty, 3, mode)
    xs = [make_input(rank, 2 + rank) for rank in range(3)]
    peers = ring(3) if mode.schedule == "ring" else random_peers(3, seed=2)
    ys, _ = simulate(make_model(), xs, peers, detach=mode.backward == "detach")
    grads = torch.autograd.grad(torch.stack([loss_of(y) for y in ys]).sum(), xs, create_graph=True)
    torch.stack([grad.square().sum() for grad in grads]).sum().backward()
    for x, grad, (our_grad, our_second) in zip(xs, grads, results, strict=True):
        assert x.grad is not None
        assert_close(our_grad, grad)
        assert_close(our_second, x.grad)


@pytest.mark.parametrize("world_size", [2, 3, 5, 8, 64])
def test_random_peers_are_one_cycle_without_fixed_points(world_size: int) -> None:
    for step in range(20):
        pairs = [
            permutations.shuffle_peers(torch.tensor(step), 7, 1, rank, world_size).tolist()
            for rank in range(world_size)
        ]
        seen, rank = [], 0
        for _ in range(world_size):
            seen.append(rank)
            assert pairs[pairs[rank][0]][1] == rank
            rank = pairs[rank][0]
        assert rank == 0
        assert sorted(seen) == list(range(world_size))


def test_random_peers_are_evenly_distributed_over_steps_sites_and_seeds() -> None:
    """Each of the other seven ranks is the peer one time in seven, whatever is counted up."""
    num = 2100
    for vary in range(3):
        counts = torch.zeros(8, dtype=torch.int64)
        for index in range(num):
            step, site, seed = (index if vary == which else 3 for which in range(3))
            counts[permutations.shuffle_peers(torch.tensor(step), site, seed, 2, 8)[0]] += 1
        assert counts[2] == 0
        # 300 expected, standard deviation 16: five of them.
        assert (counts[[0, 1, 3, 4, 5, 6, 7]] - num // 7).abs().max() < 80


def test_random_peers_differ_between_sites_of_one_step() -> None:
    orders = {
        tuple(random_peers(8)(site, step)) for site, step in itertools.product("abcdefgh", range(8))
    }
    # 64 of 5040 cycles: 0.4 pairs are expected to agree.
    assert len(orders) >= 60


def test_the_phases_are_proper_ops() -> None:
    """``opcheck`` on what shuffling adds: schemas, fakes, autograd, tracing."""
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    own, other = reference.moments(x), reference.moments(x * 2 + 1)
    stats = reference.statistics(other, 1e-5, torch.float64)
    grad, weight = torch.randn_like(x), torch.rand(3, dtype=torch.float64)
    sums = torch.randn(6, dtype=torch.float64)
    ops = torch.ops.bnrewrite
    for lent in (sums, None):
        arguments = (grad, x, stats, own, weight, lent, 1e-5)
        torch.library.opcheck(ops.shuffle_backward.default, arguments)
        assert_close(
            ops.shuffle_backward(*arguments), reference.shuffle_backward(*arguments), 1e-12
        )
    torch.library.opcheck(ops.shuffle_peers.default, (torch.tensor(3), 5, 0, 1, 4))
    running = (torch.zeros(3), torch.ones(3), torch.tensor(0))
    torch.library.opcheck(ops.update_running.default, (own, *running, 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_shuffle_backward_in_every_dtype_and_layout(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x = torch.randn(6, 7, 9, 5).to(dtype).contiguous(memory_format=layout)
    grad = torch.randn_like(x)
    own, other = reference.moments(x), reference.moments(x.double() * 3 + 2)
    stats = reference.statistics(other, 1e-5, torch.float32)
    weight = torch.rand(7) + 0.5
    sums = torch.randn(14, dtype=torch.float64) * 20
    for lent in (sums, None):
        ours = torch.ops.bnrewrite.shuffle_backward(grad, x, stats, own, weight, lent, 1e-5)
        exact = reference.shuffle_backward(
            grad.double(), x.double(), stats.double(), own, weight.double(), lent, 1e-5
        )
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=layout)
        # Three roundings to the dtype at most (both maps and their difference), and float32.
        assert_close(ours.double(), exact, 4 * torch.finfo(dtype).eps)


def test_one_process_is_plain_batch_norm() -> None:
    plain, model = make_model(), bnrewrite.convert(make_model(), "shuffle")
    x = make_input(0, 4)
    assert_close(model(x), plain(x))
    loss_of(model(x)).backward()
    assert x.grad is not None
    ours, x.grad = x.grad, None
    loss_of(plain(x)).backward()
    assert x.grad is not None
    assert_close(ours, x.grad)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "star"}, ValueError, "schedule must be 'ring' or 'random', but it is 'star'"),
        ({"backward": "none"}, ValueError, "backward must be 'exact' or 'detach'"),
        ({"running": True}, ValueError, "running must be 'peer' or 'group', but it is True"),
        ({"seed": -1}, ValueError, "seed must be from 0 to"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, but it is float"),
        ({"seed": True}, TypeError, "seed must be an integer, but it is bool"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Shuffle(**options)  # pyright: ignore[reportArgumentType]
