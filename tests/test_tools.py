"""Tools that look at models, and what changes while they train, where children are inlined."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import l1_unstructured
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import bnrewrite
from tests.ranks import RankPool
from tests.test_nothing_lost import Residual, batch

aten = torch.ops.aten


class Shortcut(nn.Module):
    """A block whose shortcut has a layer of its own, which shares a collective with the body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


def make_tracked() -> Any:
    """A network of captured graphs, of which some contain those of children."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), Shortcut(), Residual(), Shortcut()).double()


def tracked(keep: Sequence[str] = ()) -> tuple[Any, Any]:
    """The same network plain and converted, in float64."""
    plain = make_tracked()
    return plain, bnrewrite.convert(copy.deepcopy(plain), keep=list(keep))


INLINED = {f"{block}.{part}" for block in (1, 3) for part in ("body", "shortcut")}


def step(model: nn.Module) -> Tensor:
    """Forward and backward on a fixed batch; the loss."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    loss = model(x).square().mean()
    loss.backward()
    return loss


class TwoNames(nn.Module):
    """Its branches have other names in the head that runs them side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2)
        )
        self.head = Beside(self.left, self.right)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class Beside(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


@pytest.mark.parametrize("name", ["left", "head.one"])
def test_what_is_kept_may_be_called_by_another_name(name: str) -> None:
    assert "head.one" in bnrewrite.report(bnrewrite.convert(TwoNames())).inlined()
    kept = bnrewrite.report(bnrewrite.convert(TwoNames(), keep=(name,))).inlined()
    assert "head.one" not in kept


class TestTools:
    """What looks at models while they run."""

    def test_the_report_names_the_inlined_modules(self) -> None:
        _, converted = tracked()
        assert set(bnrewrite.report(converted).inlined()) == INLINED
        _, kept = tracked(keep=["*.body", "*.shortcut"])
        assert not bnrewrite.report(kept).inlined()

    def test_hooks_on_inlined_modules_run(self) -> None:
        plain, converted = tracked()
        for model in (plain, converted):
            for name in sorted(INLINED):
                model.get_submodule(name).register_forward_hook(lambda m, args, out: out * 2)
        torch.testing.assert_close(step(converted), step(plain), rtol=1e-10, atol=1e-12)

    def test_summaries(self) -> None:
        """A summary hooks every module, notes shapes and parameters, and takes its hooks away."""
        tables = []
        for model in tracked():
            rows: list[Any] = []
            handles = []
            for name, module in model.named_modules():

                def row(
                    module: nn.Module, args: Any, out: Tensor, name: str = name, rows: Any = rows
                ) -> None:
                    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
                    kind = module.__class__.__name__
                    rows.append((name, kind, [*args[0].shape], [*out.shape], size))

                handles.append(module.register_forward_hook(row))
            was_training = model.training
            with torch.no_grad():
                model.eval()(batch(2))
            model.train(was_training)
            for handle in handles:
                handle.remove()
            tables.append((rows, sum(p.numel() for p in model.parameters())))
        assert tables[1] == tables[0]
        assert len(tables[1][0]) == len(list(make_tracked().modules()))

    def test_after_a_summary_the_graphs_run_again(self) -> None:
        _, converted = tracked()
        handles = [one.register_forward_hook(lambda *_: None) for one in converted.modules()]
        owner = converted[1]._bnrewrite_owner.train
        assert not owner.holds(converted[1])
        for handle in handles:
            handle.remove()
        assert owner.holds(converted[1])

    def test_flop_counters(self) -> None:
        counts = []
        for model in tracked():
            with FlopCounterMode(display=False) as counter:
                step(model)
            counts.append((counter.get_total_flops(), counter.get_flop_counts()))
        (total, plain), (our_total, ours) = counts
        assert our_total == total
        assert ours["Global"] == plain["Global"]
        # Calls of inlined modules are gone; what they computed is that of their owner.
        gone = {f"Sequential.{name}" for name in INLINED}
        assert plain.keys() - ours.keys() == gone
        for name in ours:
            assert ours[name][aten.convolution] == plain[name][aten.convolution], name

    def test_flop_counters_see_modules_that_are_kept(self) -> None:
        counts = []
        for model in tracked(keep=["*.body", "*.shortcut"]):
            with FlopCounterMode(display=False) as counter:
                step(model)
            counts.append({k: dict(v) for k, v in counter.get_flop_counts().items()})
        assert counts[1] == counts[0]

    def test_module_trackers(self) -> None:
        seen = []
        for model in tracked():
            tracker = ModuleTracker()
            convolutions: list[set[str]] = []

            class Watch(TorchDispatchMode):
                def __torch_dispatch__(
                    self, func, types, args=(), kwargs=None, t=tracker, found=convolutions
                ):
                    if func is aten.convolution.default and not t.is_bw:
                        found.append(t.parents - {f"Sequential.{name}" for name in INLINED})
                    return func(*args, **(kwargs or {}))

            with tracker, Watch():
                step(model)
            seen.append(sorted(convolutions, key=sorted))
        assert seen[1] == seen[0]
        assert len(seen[1]) == 7

    def test_the_profiler_with_stacks(self) -> None:
        found = []
        for model in tracked():
            with torch.profiler.profile(with_stack=True, acc_events=True) as profile:
                step(model)
            counts = Counter(event.name for event in profile.events() or ())
            modules = {name for name in counts if name.startswith("nn.Module: ")}
            kinds = {name.removeprefix("nn.Module: ").rpartition("_")[0] for name in modules}
            found.append((counts, kinds))
        (plain, seen), (ours, kinds) = found
        for name in ("aten::convolution", "aten::convolution_backward"):
            assert ours[name] == plain[name], name
        if not seen:
            pytest.skip("this profiler sees no modules, as torch 2.11 on Python 3.12")
        assert kinds >= {"Sequential", "Shortcut", "Residual", "Conv2d"}


class TestTraining:
    """What changes while a model trains."""

    def test_momentum_changed_between_steps(self) -> None:
        plain, converted = tracked()
        for momentum in (0.1, 0.5, None, 0.0, 0.9):
            for model in (plain, converted):
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.momentum = momentum
                step(model)
            for ours, theirs in zip(converted.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    def test_flags_of_layers_inside_inlined_modules(self) -> None:
        plain, converted = tracked()
        changes: list[Callable[[Any], Any]] = [
            lambda model: model[1].shortcut[1].eval(),
            lambda model: model[3].body.eval(),
            lambda model: model.train(),
            lambda model: model.eval(),
            lambda model: model[1].train(),
            lambda model: model.requires_grad_(False).train(),
        ]
        for change in changes:
            results = []
            for model in (plain, converted):
                change(model)
                results.append(model(batch(2) * 0 + torch.linspace(0, 1, 8).double()))
            torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
            for ours, theirs in zip(converted.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    def test_replacing_what_is_inlined(self) -> None:
        plain, converted = tracked()
        changes: list[Callable[[Any], Any]] = [
            lambda model: setattr(model[1], "shortcut", nn.Identity()),
            lambda model: model[3].body.__setitem__(0, nn.Identity()),
            lambda model: model[3].shortcut.__setitem__(1, nn.GroupNorm(2, 4).double()),
            lambda model: model[3].body.append(nn.Tanh()),
        ]
        for change in changes:
            for model in (plain, converted):
                change(model)
            torch.testing.assert_close(step(converted), step(plain), rtol=1e-10, atol=1e-12)

    def test_parametrizations_and_pruning(self) -> None:
        class Double(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return weight * 2

        plain, converted = tracked()
        for model in (plain, converted):
            torch.manual_seed(2)
            weight_norm(model[0])
            register_parametrization(model[1].shortcut[1], "weight", Double())
            register_parametrization(model[2].bn1, "bias", Double())
            l1_unstructured(model[2].bn2, "weight", 0.5)
            l1_unstructured(model[3].body[1], "weight", 0.5)
        for _ in range(2):
            torch.testing.assert_close(step(converted), step(plain), rtol=1e-10, atol=1e-12)

    def test_exponential_moving_averages(self) -> None:
        results = []
        for model in tracked():
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                step(model)
                optimizer.step()
                average.update_parameters(model)
            assert isinstance(average.get_submodule("module.2.bn1"), nn.BatchNorm2d)
            x = torch.ones(2, 3, 8, 8, dtype=torch.float64)
            results.append([average.eval()(x), *average.state_dict().values()])
        for ours, theirs in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("assign", [False, True])
    def test_loading_and_going_on(self, assign: bool) -> None:
        plain, converted = tracked()
        step(plain)
        states = copy.deepcopy(plain.state_dict()), copy.deepcopy(plain.state_dict())
        assert converted.load_state_dict(states[0], assign=assign) == ([], [])
        again = make_tracked()
        assert again.load_state_dict(states[1], assign=assign) == ([], [])
        torch.testing.assert_close(step(converted), step(again), rtol=1e-10, atol=1e-12)
        back = make_tracked()
        assert back.load_state_dict(converted.state_dict(), assign=assign) == ([], [])
        torch.testing.assert_close(step(back), step(again), rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("how", ["half", "bfloat16", "float", "to"])
    def test_methods_that_change_the_dtype(self, how: str) -> None:
        results = []
        for model in tracked():
            model = model.to("cpu", torch.float32) if how == "to" else getattr(model, how)()
            dtype = next(model.parameters()).dtype
            results.append(model(torch.linspace(-1, 1, 384).view(2, 3, 8, 8).to(dtype)))
            assert model[1].body[1].running_mean.dtype == dtype
        tolerance = 32 * torch.finfo(results[0].dtype).eps
        torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


def _sharded_inside(rank: int, world_size: int, order: str) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    model = make_tracked()
    if order == "convert first":
        bnrewrite.convert(model)
    for block in (model[1].body, model[1].shortcut, model[2], model[3]):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if order == "shard first":
        bnrewrite.convert(model)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(step(model).detach())
        optimizer.step()
    return losses


@pytest.mark.parametrize("order", ["convert first", "shard first"])
def test_sharding_what_would_be_inlined(order: str, ranks: RankPool) -> None:
    plain = make_tracked()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = []
    for _ in range(2):
        optimizer.zero_grad()
        expected.append(step(plain).detach())
        optimizer.step()
    # Both ranks have the same batch, so the statistics of both are those of one.
    for losses in ranks.run(_sharded_inside, 2, order):
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)


def _counted(rank: int, world_size: int) -> list[Any]:
    results = []
    for model in tracked():
        with FlopCounterMode(display=False) as counter:
            loss = step(model)
        results.append((counter.get_total_flops(), loss.detach()))
    return results


def test_flop_counters_on_ranks(ranks: RankPool) -> None:
    for (plain_flops, plain_loss), (flops, loss) in ranks.run(_counted, 2):
        # Weight gradients wait for collectives, and are counted all the same.
        assert flops == plain_flops
        torch.testing.assert_close(loss, plain_loss, rtol=1e-10, atol=1e-12)
