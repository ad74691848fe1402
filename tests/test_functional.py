"""Calls of ``F.batch_norm`` in forwards that run as they are: sites all the same.

The reference is the unconverted module in one process, in float64, with the batches of all ranks.
"""

import copy
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import bnrewrite
from tests.ranks import CountCollectives, RankPool

NUM = 3
"""Features."""


def _convert(net: nn.Module, mode: Any = "sync") -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*and its class mentions batch_norm")
        return bnrewrite.convert(net, mode)


class Norm(nn.Module):
    """A BatchNorm of its own; ``traceable`` says whether a graph can stand for its forward."""

    def __init__(self, *, traceable: bool = False) -> None:
        super().__init__()
        self.traceable = traceable
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(NUM))
        self.register_buffer("var", torch.ones(NUM))
        self.weight = nn.Parameter(torch.linspace(0.5, 2, NUM))
        self.momentum = 0.1

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.dim() != 2:
            raise ValueError("2 dimensions")
        return self.norm(x)

    def norm(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        return F.batch_norm(x, mean, var, self.weight, None, self.training, self.momentum)


class OfALayer(Norm):
    """Statistics and weights of a BatchNorm module."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(NUM)

    def norm(self, x: Tensor) -> Tensor:
        bn: Any = self.bn
        x = F.batch_norm(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, 1e-3
        )
        return bn(x.sin())


class InAContainer(Norm):
    """Statistics in a module without a forward, and in a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ModuleDict({"held": nn.Module()})
        self.held["held"].register_buffer("mean", torch.zeros(NUM))
        self.held["held"].register_buffer("var", torch.ones(NUM))
        stats = (torch.zeros(NUM), torch.ones(NUM))
        self.stats = nn.ParameterList(nn.Parameter(one, requires_grad=False) for one in stats)

    def norm(self, x: Tensor) -> Tensor:
        held: Any = self.held["held"]
        x = F.batch_norm(x, held.mean, held.var, training=self.training)
        mean, var = self.stats
        return F.batch_norm(x.sin(), mean, var, training=self.training)


class Standardizing(Norm):
    """Weights that are standardized, and samples that are normalized by themselves, beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.arange(2.0 * NUM).reshape(2, NUM).sin())
        self.gain = nn.Parameter(torch.ones(2))

    def norm(self, x: Tensor) -> Tensor:
        rows = F.batch_norm(self.rows[None], None, None, self.gain, training=True)[0]
        x = super().norm(F.linear(x, rows) @ rows)
        mean, var = self.mean.repeat(len(x)), self.var.repeat(len(x))
        samples = x.reshape(1, -1, 1).repeat(1, 1, 4) * torch.arange(4)
        return F.batch_norm(samples, mean, var, training=True).sum(-1).reshape_as(x) + x


class Nested(Norm):
    """One that calls another, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.bn = Norm(), nn.BatchNorm1d(NUM)
        self.traced = Norm(traceable=True)

    def norm(self, x: Tensor) -> Tensor:
        return super().norm(self.traced(self.bn(self.inner(x).sin()).sin()).sin())


class ByWeight(Norm):
    """No running statistics, so that only a graph tells which call it is; the momentum changes."""

    def __init__(self) -> None:
        super().__init__(traceable=True)

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, training=True, momentum=self.momentum)


class Optional(Norm):
    """An argument that the graph does not know."""

    def __init__(self) -> None:
        super().__init__(traceable=True)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.norm(x * scale)


class Scheduled(Norm):
    """A graph until the momentum changes."""

    def __init__(self) -> None:
        super().__init__(traceable=True)


KINDS: dict[str, Callable[[], Norm]] = {
    one.__name__: one
    for one in (
        Norm, OfALayer, InAContainer, Standardizing, Nested, ByWeight, Optional, Scheduled,
    )
}  # fmt: skip


class Net(nn.Sequential):
    """A layer, and such a module."""

    def forward(self, x: Tensor) -> Tensor:
        layer, norm = self
        return norm(layer(x), **({"scale": 2.0} if isinstance(norm, Optional) else {}))


def _net(kind: str) -> Any:
    torch.manual_seed(0)
    return Net(nn.Linear(NUM, NUM), KINDS[kind]()).double()


def _train(net: Any, run: Any, batches: Tensor, rows: slice) -> list[dict[str, Tensor]]:
    seen = []
    for step, batch in enumerate(batches):
        net.zero_grad()
        x = batch[rows].clone().requires_grad_()
        net[1].momentum = 0.1 + step / 8
        y = run(x)
        (y.square() * torch.arange(1, NUM + 1)).sum().backward()
        grads: Any = {name: one.grad for name, one in net.named_parameters()}
        if dist.is_initialized():
            for grad in grads.values():
                if grad is not None:
                    dist.all_reduce(grad)
        state = {name: one.clone() for name, one in net.state_dict().items()}
        seen.append({"y": y.detach(), "x": x.grad, **{f"grad {n}": g for n, g in grads.items()}})
        seen[-1].update(state)
    return seen


def _batches(total: int) -> Tensor:
    return torch.randn(3, total, NUM, generator=torch.Generator().manual_seed(1)).double() * 2 + 1


def _on_rank(rank: int, world_size: int, kind: str, sizes: list[int], compiled: bool) -> Any:
    torch._dynamo.reset()
    net: Any = _convert(_net(kind))
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    first = sum(sizes[:rank])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return _train(net, run, _batches(sum(sizes)), slice(first, first + sizes[rank]))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_equal_one_process(kind: str, compiled: bool, ranks: RankPool) -> None:
    sizes = [5, 2]
    plain: Any = _net(kind)
    expected = _train(plain, plain, _batches(sum(sizes)), slice(None))
    results = ranks.run(_on_rank, 2, kind, sizes, compiled)
    for rank, result in enumerate(results):
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for got, true in zip(result, expected, strict=True):
            for name, value in true.items():
                of_batch = name in ("x", "y")
                want = value[rows] if of_batch else value
                if value is None:
                    assert got[name] is None
                else:
                    # Sums of some ten terms in float64, in another order.
                    torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-11)


MODES: dict[str, Any] = {
    "sync": "sync",
    "local": "local",
    "frozen": "frozen",
    "ring": "shuffle",
    "random": bnrewrite.Shuffle(schedule="random", seed=7),
    "group": bnrewrite.Shuffle(running="group"),
}


def _as_the_graph(rank: int, world_size: int, mode: str) -> list[Any]:
    results = []
    for traceable in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(NUM, NUM), Norm(traceable=traceable)).double()
        net = _convert(net, MODES[mode])
        x = _batches(8)[:, 4 * rank : 4 * rank + 4]
        seen = [net(one).detach() for one in x]
        seen += [net.eval()(x[0]).detach()]
        results.append((seen, [*net.buffers()]))
    return results


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_as_in_a_graph(mode: str, ranks: RankPool) -> None:
    for graph, own in ranks.run(_as_the_graph, 2, mode):
        torch.testing.assert_close(own, graph, rtol=1e-12, atol=1e-12)


class RunAgain(Norm):
    """Calls inside what backward runs again, or by itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def norm(self, x: Tensor) -> Tensor:
        if self.how == "function":
            return _Function.apply(x, self.mean, self.var)  # pyright: ignore
        if self.how == "no_grad":
            with torch.no_grad():
                return super().norm(x)
        return checkpoint(super().norm, x, use_reentrant=self.how == "reentrant")  # pyright: ignore


class _Function(torch.autograd.Function):
    """Computes in backward what forward computed, to save memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x)
        return F.batch_norm(x, mean, var, training=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = F.batch_norm(x, None, None, training=True)
        return (*torch.autograd.grad(y, x, grad), None, None)


class LayerRunAgain(nn.BatchNorm1d):
    """A BatchNorm with such a function."""

    def forward(self, input: Tensor) -> Tensor:
        return _Function.apply(input, self.running_mean, self.running_var)  # pyright: ignore


def _run_again(rank: int, world_size: int, how: str) -> list[str]:
    plain = LayerRunAgain(NUM).double() if how == "layer" else RunAgain(how).double()
    ours = _convert(copy.deepcopy(plain))
    x = _batches(8)[0, 4 * rank : 4 * rank + 4]
    results = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for net in (plain, ours):
            leaf = x.clone().requires_grad_()
            y = net(leaf) + leaf
            y.sin().sum().backward()
            results.append((y, leaf.grad, [*net.buffers()]))
    torch.testing.assert_close(*results)
    return [str(one.message) for one in warned if "inside a checkpoint" in str(one.message)]


@pytest.mark.parametrize("how", ["function", "layer", "no_grad", "reentrant", "not reentrant"])
def test_what_backward_runs_again_stays_local_and_is_named(how: str, ranks: RankPool) -> None:
    for messages in ranks.run(_run_again, 2, how):
        assert messages
        assert all(": this call of torch.nn" in one for one in messages)


class Checkpointing(Norm):
    """A call that only an argument puts into a checkpoint."""

    def forward(self, x: Tensor, saves: bool = False) -> Tensor:  # pyright: ignore
        y: Any = checkpoint(self.norm, x, use_reentrant=False) if saves else self.norm(x)
        return y


def _compiled_checkpoint(rank: int, world_size: int) -> list[str]:
    plain = Checkpointing().double()
    ours = _convert(copy.deepcopy(plain))
    compiled: Any = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = _batches(8)[0, 4 * rank : 4 * rank + 4]
    compiled(x)
    ours.load_state_dict(plain.state_dict())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.testing.assert_close(compiled(x, True), plain(x, True))
    return [str(one.message) for one in warned if "batch_norm" in str(one.message)]


def test_calls_in_a_compiled_checkpoint_are_named(ranks: RankPool) -> None:
    for said in ranks.run(_compiled_checkpoint, 2):
        (message,) = said
        assert "with local statistics in training" in message


def _in_ddp(rank: int, world_size: int) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(NUM, NUM), Norm(), nn.BatchNorm1d(NUM))
    model = DistributedDataParallel(_convert(net))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    comm = CountCollectives()
    for batch in _batches(6).float():
        optimizer.zero_grad()
        comm.seen.clear()
        with comm:
            y = model(batch[3 * rank : 3 * rank + 3])
            (y * torch.arange(NUM)).square().sum().backward()
        optimizer.step()
    functional = [one for one in comm.seen if one[0].startswith("all_")]
    return len(functional), {name: one.clone() for name, one in net.state_dict().items()}


def test_ddp_trains_with_it(ranks: RankPool) -> None:
    (count, one), (_, other) = ranks.run(_in_ddp, 2)
    # Two sites forward, two backward, besides DDP's own.
    assert count >= 4
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def _disagreeing(rank: int, world_size: int) -> str:
    model = _convert(nn.Sequential(Norm()), "shuffle" if rank else "sync")
    try:
        model(torch.randn(4, NUM))
    except bnrewrite.ScheduleError as error:
        return str(error)
    return ""


def test_ranks_agree_on_it(ranks: RankPool) -> None:
    for said in ranks.run(_disagreeing, 2):
        assert "0.batch_norm" in said


def test_frozen_takes_running_statistics() -> None:
    net = Norm()
    net.mean += 1
    net.var += 2
    expected = net.eval()(_batches(4)[0].float())
    model = _convert(net, "frozen").train()
    torch.testing.assert_close(model(_batches(4)[0].float()), expected)
    torch.testing.assert_close(model.mean, torch.ones(NUM))


def test_errors_name_the_call() -> None:
    model = _convert(nn.Sequential(Norm()))
    with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=r"^0\.batch_norm: .*3.*5"):
        model(torch.randn(4, 5))


def test_what_becomes_of_it_is_said() -> None:
    with pytest.warns(UserWarning, match=r"0 \(Norm\) branches.*the module holds communicate one"):
        model = bnrewrite.convert(nn.Sequential(Norm()))
    assert "0: branches on a computed value or shape" in str(bnrewrite.report(model))
    # Nobody knows which of the calls a pattern means.
    modes = {"0.batch_norm_1": "frozen", "*": "sync"}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="matches none"):
            bnrewrite.convert(nn.Sequential(Norm()), modes)
    assert any("that call uses local statistics" in str(one.message) for one in warned)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_and_pickles_keep_it(copied: Callable[[Any], Any]) -> None:
    net = Norm()
    net.mean += 1
    x = _batches(4)[0].float()
    expected = net.eval()(x)
    model = copied(_convert(nn.Sequential(net), "frozen").train())
    torch.testing.assert_close(model(x), expected)
    plain = bnrewrite.revert(model)
    assert not [name for name in vars(plain[0]) if name.startswith("_bnrewrite")]
    assert type(plain[0]) is Norm


class Counting(Norm):
    """One that torch.fx can trace and we do not, since it changes an attribute."""

    def __init__(self) -> None:
        super().__init__(traceable=True)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        rows = F.batch_norm(torch.eye(NUM)[None], None, None, training=True)[0]
        return self.norm(x) @ rows


def test_torch_fx_does_not_lose_it() -> None:
    model = _convert(nn.Sequential(Counting()))
    with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=r"^0\.batch_norm: torch\.fx would"):
        torch.fx.symbolic_trace(model)
    torch.fx.symbolic_trace(bnrewrite.revert(model))


class Fast(Norm):
    """A weight that a call may bring along, and one that a flag chooses."""

    def __init__(self) -> None:
        super().__init__(traceable=True)
        self.uses = "weight"
        self.others = nn.ParameterDict({"one": torch.ones(NUM), "two": torch.ones(NUM)})

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        y = F.batch_norm(x, None, None, weight, training=True)
        if self.uses != "weight":
            y = F.batch_norm(y, None, None, self.others[self.uses], training=True)
        return y


def _lost(rank: int, world_size: int, how: str, compiled: bool) -> list[str]:
    torch._dynamo.reset()
    net: Any = _convert(Fast())
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    x = torch.randn(4, NUM)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run(x)
        assert not [one for one in warned if "batch_norm" in str(one.message)]
        if how == "argument":
            run(x, torch.ones(NUM))
        else:
            net.uses = "two"
            run(x)
    return [str(one.message) for one in warned if "batch_norm" in str(one.message)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["argument", "attribute"])
def test_calls_that_nothing_tells_are_named(how: str, compiled: bool, ranks: RankPool) -> None:
    for said in ranks.run(_lost, 2, how, compiled):
        (message,) = said
        assert "with local statistics in training" in message
        if not compiled:
            assert "test_functional.py:" in message
            assert ("because uses was 'weight' and is 'two'" in message) == (how == "attribute")


def test_what_may_hold_statistics_may_go() -> None:
    net: Any = InAContainer()
    net.extra = nn.ModuleList()
    net.bn = nn.BatchNorm1d(NUM)
    model = _convert(net)
    expected = model(_batches(4)[0].float())
    del model.extra
    model.bn = None
    torch.testing.assert_close(model(_batches(4)[0].float()), expected)


def _in_a_checkpoint(rank: int, world_size: int) -> list[str]:
    torch._dynamo.reset()
    net: Any = _convert(Norm())

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=False)  # pyright: ignore

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run(torch.randn(4, NUM))
    return [str(one.message) for one in warned if "batch_norm" in str(one.message)]


def test_a_compiled_checkpoint_around_it_is_named(ranks: RankPool) -> None:
    """Dynamo allows no mode inside one."""
    for said in ranks.run(_in_a_checkpoint, 2):
        (message,) = said
        assert "with local statistics in training" in message


def test_deleted_variables_go_at_once() -> None:
    class Deleting(Norm):
        def norm(self, x: Tensor) -> Tensor:
            large = x * 2
            reference = weakref.ref(large)
            y = super().norm(x)
            del large
            assert reference() is None
            return y

        def forward(me, x: Tensor) -> Tensor:  # noqa: N805
            return super().forward(x)

    _convert(Deleting())(torch.randn(4, NUM))


class Above(Norm):
    """A forward in the style of Python 2, which a subclass would run for ever."""

    def forward(self, x: Tensor) -> Tensor:
        return super(self.__class__, self).forward(x)  # pyright: ignore


def test_what_a_subclass_would_break_stays_as_it_is() -> None:
    with pytest.warns(UserWarning, match="that call uses local statistics"):
        model = bnrewrite.convert(nn.Sequential(Above(), nn.BatchNorm1d(NUM)))
    assert model(torch.randn(4, NUM)).shape == (4, NUM)


class Counted(nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return weight * 2


def test_a_parametrized_weight_is_computed_for_its_call_only() -> None:
    def count(net: Any) -> int:
        for step in range(3):
            net.momentum = step / 4
            net(_batches(4)[0].float())
        return net.parametrizations.weight[0].count

    nets = [ByWeight(), ByWeight()]
    for net in nets:
        parametrize.register_parametrization(net, "weight", Counted())
    assert count(_convert(nets[0])) == count(nets[1])


def _checkpointed(rank: int, world_size: int, reentrant: bool) -> None:
    x = _batches(8)[0, 4 * rank : 4 * rank + 4]
    results = []
    for how in (False, True):
        net = _convert(Nested().double())
        leaf = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y: Any = checkpoint(net, leaf, use_reentrant=reentrant) if how else net(leaf)
            y.sin().sum().backward()
        results.append((y, leaf.grad, [one.grad for one in net.parameters()], [*net.buffers()]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_may_be_around_it(reentrant: bool, ranks: RankPool) -> None:
    ranks.run(_checkpointed, 2, reentrant)
