"""Mode ``shuffle`` in whole models: compilers, DDP, groups, copies, reports, kinds of sites."""

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bnrewrite
from bnrewrite import Shuffle, Sync
from bnrewrite.errors import BnRewriteError, UnsupportedBatchNorm
from tests.ranks import RankPool
from tests.shuffled import assert_close, loss_of, make_input, make_model


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x.grad = None
    y = model(x)
    loss_of(y).backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _compiled(rank: int, world_size: int, mode: Shuffle, backend: str) -> None:
    models = [bnrewrite.convert(make_model(), mode) for _ in range(2)]
    x = make_input(rank, 2 + rank)
    compiled: Any = torch.compile(models[1], backend=backend, fullgraph=True)
    for step in range(3):
        if step == 1:
            # From here on a permutation that depended on the step would be a recompilation.
            torch.compiler.set_stance("fail_on_recompile")
        with warnings.catch_warnings():
            # The import of Inductor warns about TorchScript.
            warnings.simplefilter("ignore")
            ours = _gradients(compiled, x)
        for our, their in zip(ours, _gradients(models[0], x), strict=True):
            assert_close(our, their, scale=1.0)
        for (name, our), their in zip(models[1].named_buffers(), models[0].buffers(), strict=True):
            assert_close(our, their, what=name, scale=1.0)
    torch.compiler.set_stance("default")


@pytest.mark.parametrize(
    "mode",
    [Shuffle(), Shuffle("random"), Shuffle("random", "detach", "group")],
    ids=["ring", "random", "random-detach-group"],
)
def test_fullgraph_compile_is_the_same_and_never_recompiles(ranks: RankPool, mode: Shuffle) -> None:
    ranks.run(_compiled, 3, mode, "aot_eager")


@pytest.mark.slow
def test_inductor_is_the_same(ranks: RankPool) -> None:
    for mode in (Shuffle(), Shuffle("random")):
        ranks.run(_compiled, 2, mode, "inductor", timeout_s=300)


def _collectives(rank: int, world_size: int, mode: Shuffle) -> list[dict[Any, int]]:
    model = bnrewrite.convert(make_model(), mode)
    x = make_input(rank, 2)
    counts = []
    with CommDebugMode() as comm:
        loss = loss_of(model(x))
    counts.append({str(op): num for op, num in comm.get_comm_counts().items()})
    with CommDebugMode() as comm:
        loss.backward()
    counts.append({str(op): num for op, num in comm.get_comm_counts().items()})
    model.eval()
    with CommDebugMode() as comm:
        model(x)
    counts.append({str(op): num for op, num in comm.get_comm_counts().items()})
    report = bnrewrite.report(model)
    assert report.collectives_forward == sum(counts[0].values())
    assert report.collectives_backward == sum(counts[1].values())
    assert [site.mode for site in report.sites] == ["shuffle"] * 3
    assert [site.group for site in report.sites] == ["default"] * 3
    return counts


@pytest.mark.parametrize(
    ("mode", "forward", "backward"),
    [
        (Shuffle(), "all_to_all_single", "all_to_all_single"),
        (Shuffle(backward="detach"), "all_to_all_single", None),
        (Shuffle(running="group"), "all_gather_into_tensor", "all_to_all_single"),
        (Shuffle("random"), "all_gather_into_tensor", "all_gather_into_tensor"),
        (Shuffle("random", "detach"), "all_gather_into_tensor", None),
    ],
    ids=["ring", "detach", "group", "random", "random-detach"],
)
def test_one_collective_per_site_forward_and_at_most_one_backward(
    ranks: RankPool, mode: Shuffle, forward: str, backward: str | None
) -> None:
    for counts in ranks.run(_collectives, 2, mode):
        assert counts[0] == {f"c10d_functional.{forward}": 3}
        assert counts[1] == ({} if backward is None else {f"c10d_functional.{backward}": 3})
        assert counts[2] == {}, "evaluation communicates"


def _ring_payload(rank: int, world_size: int) -> list[int]:
    sent: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops._c10d_functional.all_to_all_single.default:
                result = func(*args, **(kwargs or {}))
                sent.extend((args[0].numel(), result.numel()))
                return result
            return func(*args, **(kwargs or {}))

    model = bnrewrite.convert(make_model(), "shuffle")
    with Watch():
        loss_of(model(make_input(rank, 2))).backward()
    return sent


@pytest.mark.parametrize("world_size", [2, 4])
def test_ring_sends_and_receives_o_of_c_numbers_for_any_number_of_ranks(
    ranks: RankPool, world_size: int
) -> None:
    forward = [2 * c + 1 for c in (3, 5, 4) for _ in range(2)]
    backward = [2 * c for c in (4, 5, 3) for _ in range(2)]
    assert ranks.run(_ring_payload, world_size) == [forward + backward] * world_size


def _ddp(rank: int, world_size: int, compile: bool) -> list[Tensor]:
    model = bnrewrite.convert(make_model(), Shuffle(running="group"))
    model: Any = DistributedDataParallel(model)
    if compile:
        model = torch.compile(model, backend="aot_eager")
    for step in range(2):
        loss_of(model(make_input(rank, 2, step))).backward()
    return [p.grad for p in model.parameters()] + list(model.buffers())


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_ddp_keeps_buffers_of_the_group_and_averages_gradients(
    ranks: RankPool, compile: bool
) -> None:
    first, second = ranks.run(_ddp, 2, compile)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
    assert first[-1] == 2


def _sub_groups(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[rank % 2]
    assert isinstance(group, dist.ProcessGroup)
    model = bnrewrite.convert(make_model(), "shuffle", process_group=group)
    ours = _gradients(model, make_input(rank, 2 + rank))
    copied = copy.deepcopy(model)
    pickle.dumps(model)
    copied.load_state_dict(make_model().state_dict())
    compiled: Any = torch.compile(copied, backend="aot_eager", fullgraph=True)
    return ours, _gradients(compiled, make_input(rank, 2 + rank))


def _two_of(rank: int, world_size: int, members: list[int]) -> list[Tensor]:
    model = bnrewrite.convert(make_model(), "shuffle")
    return _gradients(model, make_input(members[rank], 2 + members[rank]))


def test_sub_groups_shuffle_among_themselves(ranks: RankPool) -> None:
    """Groups {0, 2} and {1, 3} of four ranks do what two worlds do; so do compiled copies."""
    results = ranks.run(_sub_groups, 4)
    for members in ([0, 2], [1, 3]):
        for rank, theirs in zip(members, ranks.run(_two_of, 2, members), strict=True):
            for ours in results[rank]:
                for a, b in zip(ours, theirs, strict=True):
                    assert_close(a, b, 1e-12, scale=1.0)


def _resumed(rank: int, world_size: int, mode: Shuffle) -> None:
    model = bnrewrite.convert(make_model(), mode)
    outputs = []
    saved = io.BytesIO()
    for step in range(6):
        if step == 3:
            torch.save(model.state_dict(), saved)
        outputs.append(model(make_input(rank, 2, step % 3)))
    assert not torch.equal(outputs[0], outputs[3]), "the permutation is not that of a new step"
    saved.seek(0)
    again = bnrewrite.convert(make_model(), mode)
    again.load_state_dict(torch.load(saved))
    for step in range(3, 6):
        assert torch.equal(again(make_input(rank, 2, step % 3)), outputs[step])


def test_a_random_schedule_resumes_from_a_checkpoint(ranks: RankPool) -> None:
    ranks.run(_resumed, 4, Shuffle("random", seed=4))


def _mapped(rank: int, world_size: int) -> tuple[dict[Any, int], str]:
    model = nn.ModuleDict({"encoder_q": make_model(), "encoder_k": make_model()})
    modes = {"encoder_k.*": "shuffle", "encoder_q.0": Shuffle("random"), "*": Sync()}
    bnrewrite.convert(model, modes)
    x = make_input(rank, 2)
    with CommDebugMode() as comm:
        model["encoder_q"](x)
        model["encoder_k"](x)
    text = str(bnrewrite.report(model))
    classes = [type(module) for module in bnrewrite.revert(model).modules()]
    assert classes == [type(module) for module in nn.ModuleDict(
        {"encoder_q": make_model(), "encoder_k": make_model()}
    ).modules()]  # fmt: skip
    with CommDebugMode() as after:
        model["encoder_k"](x)
    assert after.get_total_counts() == 0
    return {str(op): num for op, num in comm.get_comm_counts().items()}, text


def test_mappings_mix_modes_and_revert_takes_all_off(ranks: RankPool) -> None:
    for counts, text in ranks.run(_mapped, 2):
        assert counts == {
            # Two are sums.
            "c10d_functional.all_gather_into_tensor": 3,
            "c10d_functional.all_to_all_single": 3,
        }
        assert "mode shuffle, sync" in text


def _autocast(rank: int, world_size: int, mode: Shuffle) -> None:
    model = bnrewrite.convert(make_model().float(), mode)
    x = make_input(rank, 4).detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    loss_of(y.float()).backward()
    exact = bnrewrite.convert(make_model(), mode)
    x64 = make_input(rank, 4)
    assert_close(y.double(), exact(x64), 0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_autocast(ranks: RankPool) -> None:
    for mode in (Shuffle(), Shuffle("random")):
        ranks.run(_autocast, 2, mode)


def _checkpointed(rank: int, world_size: int) -> None:
    x = make_input(rank, 2)
    plain = bnrewrite.convert(make_model(), "shuffle")
    model = bnrewrite.convert(make_model(), "shuffle")
    expected = _gradients(plain, x)
    x.grad = None
    y: Any = checkpoint(model, x, use_reentrant=False)
    loss_of(y).backward()
    assert x.grad is not None
    assert_close(x.grad, expected[1])
    random = bnrewrite.convert(make_model(), Shuffle("random"))
    y = checkpoint(random, x, use_reentrant=False)
    with pytest.raises(BnRewriteError, match="activation checkpointing recomputes"):
        loss_of(y).backward()

    @torch.compile(backend="aot_eager")
    def compiled(model: nn.Module, x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False)

    x.grad = None
    loss_of(compiled(bnrewrite.convert(make_model(), "shuffle"), x)).backward()
    assert x.grad is not None
    assert_close(x.grad, expected[1])
    # The partitioner would recompute the permutation from the counter that the forward moved on.
    random = bnrewrite.convert(make_model(), Shuffle("random"))
    with pytest.raises(Exception, match="activation checkpointing recomputes"):
        compiled(random, x)


def test_activation_checkpointing_is_right_or_refused(ranks: RankPool) -> None:
    ranks.run(_checkpointed, 2)


def _single_value(rank: int, world_size: int) -> None:
    model = bnrewrite.convert(nn.Sequential(nn.BatchNorm1d(3)), "shuffle")
    with pytest.raises(UnsupportedBatchNorm, match=r"0: expected more than 1 value per channel"):
        model(torch.rand(1, 3))


def test_a_single_value_per_channel_is_an_error(ranks: RankPool) -> None:
    ranks.run(_single_value, 2)


def test_the_eval_graph_exports_as_plain_batch_norm(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = bnrewrite.convert(make_model().float(), Shuffle("random"))
    path = tmp_path / "model.onnx"
    bnrewrite.export_onnx(model, (make_input(0, 2).detach().float(),), path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("BatchNormalization") == 3
    assert {site.mode for site in bnrewrite.report(model).sites} == {"shuffle"}
