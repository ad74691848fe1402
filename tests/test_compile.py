"""``torch.compile(fullgraph=True)``: one rank and two, inside DDP and around it."""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import bnrewrite
from tests.models import ActivatedNorm, Functional, FunctionalNorm, ResidualNet, perturb
from tests.ranks import RankPool

pytestmark = pytest.mark.filterwarnings(
    # Inductor and AOTAutograd use what torch itself has deprecated.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)


class Small(nn.Module):
    """Two sites, a residual and a head: every part that compiling a network may trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4, momentum=None)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)) + out)
        return self.head(out.mean((2, 3)))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return perturb(Small().double())


def _x(num_samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, 3, 6, 6, generator=generator, dtype=torch.float64) + seed


def _train(model: Any, batches: list[Tensor], parameters: Any = None) -> list[Tensor]:
    """Outputs, gradients and state over some optimizer steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for x in batches:
        x = x.clone().requires_grad_()
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        assert x.grad is not None
        seen += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
    return seen + [tensor.detach().clone() for tensor in model.state_dict().values()]


def _assert_close(results: list[Tensor], expected: list[Tensor]) -> None:
    assert len(results) == len(expected)
    for a, b in zip(results, expected, strict=True):
        # float64 sums in another order.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["sync", "frozen"])
def test_one_rank_agrees_with_eager(backend: str, mode: str) -> None:
    model = bnrewrite.convert(_model(), mode)
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    batches = [_x(4), _x(4, 1)]
    _assert_close(_train(compiled, batches), _train(model, batches))
    assert not counters["graph_break"]


def test_evaluation_agrees_with_eager() -> None:
    model = bnrewrite.convert(_model()).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(_x(4)), model(_x(4)), rtol=1e-12, atol=1e-12)


def test_a_dynamic_batch_size_compiles_once() -> None:
    model = bnrewrite.convert(_model())
    compiled = torch.compile(
        copy.deepcopy(model), backend="aot_eager", fullgraph=True, dynamic=True
    )
    batches = [_x(size) for size in (4, 5, 2, 9)]
    _assert_close(_train(compiled, batches), _train(model, batches))
    assert counters["stats"]["unique_graphs"] == 1


def test_every_kind_of_site_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3), ActivatedNorm(3), FunctionalNorm(3), nn.Flatten(2), Functional(3)
    )
    model = bnrewrite.convert(perturb(model.double()))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    batches = [_x(4), _x(4, 1)]
    _assert_close(_train(compiled, batches), _train(model, batches))


def test_a_site_on_the_floor_compiles_without_a_break() -> None:
    """A hook keeps the original forward in use."""
    model: Any = bnrewrite.convert(_model())
    model.bn1.register_forward_hook(lambda m, a, out: out * 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    eager = copy.deepcopy(model)
    _assert_close(_train(compiled, [_x(4)]), _train(eager, [_x(4)]))


def _alternate(model: nn.Module, *momenta: float | None) -> int:
    """Number of graphs that a changing momentum and changing flags cost."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    bn1: Any = model.get_submodule("bn1")
    for _ in range(2):
        for momentum in momenta:
            bn1.momentum = momentum
            compiled(_x(4))
        for evaluate in (True, False):
            bn1.train(not evaluate)
            compiled(_x(4))
            model.train(not evaluate)
            compiled(_x(4))
    return counters["stats"]["unique_graphs"]


def test_alternating_momentum_and_flags_compile_no_more_than_the_plain_model() -> None:
    models = [_model(), bnrewrite.convert(_model())]
    for model in models:
        # The plain layer reads num_batches_tracked on the host where momentum is None.
        model.get_submodule("bn2").momentum = 0.1  # pyright: ignore
    plain, converted = (_alternate(model, 0.1, 0.2) for model in models)
    assert converted <= plain
    assert _alternate(models[1], 0.1, None) <= plain


# Two ranks


class _Breaks(nn.Module):
    """A child that no graph contains."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


class _Broken(nn.Module):
    """Breaks between where its forward begins and its sites."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = _Breaks(), nn.Conv2d(3, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.bn1(self.conv(self.stem(x))).relu())


def _train_broken(rank: int, world_size: int, compiles: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = bnrewrite.convert(_Broken().double())
    run: Any = torch.compile(model, backend="aot_eager") if compiles else model
    with warnings.catch_warnings():
        # Dynamo looks for the gradient of a result.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
        for seed in range(2):
            run(_x(2 + rank, seed)).square().sum().backward()
    return [*(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def test_graph_breaks_between_a_forward_and_its_sites(ranks: RankPool) -> None:
    expected = ranks.run(_train_broken, 2, False)
    for result, true in zip(ranks.run(_train_broken, 2, True), expected, strict=True):
        _assert_close(result, true)


def _one_site() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh())
    return perturb(nn.Sequential(*layers).double())


def _compile_rank(rank: int, world_size: int, how: str) -> tuple[list[Tensor], set[str]]:
    """What training computes, and the reasons of graph breaks."""
    model: Any = bnrewrite.convert(_one_site())
    counters.clear()
    if how == "inside DDP":
        model = DistributedDataParallel(torch.compile(model, fullgraph=True, dynamic=True))
    elif how == "around DDP":
        model = torch.compile(DistributedDataParallel(model), dynamic=True)
    else:
        model = DistributedDataParallel(model)
    # Ranks hold different sizes, which change from step to step.
    seen = _train(model, [_x(2 + rank, rank), _x(4 - rank, 2 + rank)])
    return seen, {reason.split("\n")[0] for reason in counters["graph_break"]}


def _whole_steps(rank: int, world_size: int, compiles: bool) -> list[Tensor]:
    model: Any = DistributedDataParallel(bnrewrite.convert(_one_site()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    run = torch.compile(step, backend="aot_eager") if compiles else step
    with warnings.catch_warnings():
        # Dynamo looks for the gradient of a result.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
        for seed in range(2):
            run(_x(2 + rank, seed))
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def test_whole_steps_compile_without_a_warning(ranks: RankPool) -> None:
    """Backward included, which Dynamo leaves to autograd: it shall compile nothing of ours."""
    expected = ranks.run(_whole_steps, 2, False)
    for result, true in zip(ranks.run(_whole_steps, 2, True), expected, strict=True):
        _assert_close(result, true)


def _breaks_of_ddp(rank: int, world_size: int) -> set[str]:
    """Reasons of graph breaks in the Python code of DDP itself, around a model without any."""
    model = DistributedDataParallel(nn.Linear(3, 3))
    counters.clear()
    torch.compile(model, backend="eager", dynamic=True)(torch.randn(2, 3)).sum().backward()
    return {reason.split("\n")[0] for reason in counters["graph_break"]}


def _net_class(number: int) -> type[nn.Module]:
    """A class with a forward of its own code, as those of different files have."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3 + number)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x).relu()

    code = Net.forward.__code__
    Net.forward.__code__ = code.replace(co_firstlineno=code.co_firstlineno + number)
    return Net


def test_models_of_several_classes_have_a_recompile_limit_each() -> None:
    models = [bnrewrite.convert(_net_class(number)()) for number in range(3)]
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = [torch.compile(one, fullgraph=True, backend="aot_eager") for one in models]
        for training in (True, False):
            for number, (model, run) in enumerate(zip(models, compiled, strict=True)):
                model.train(training)
                run(torch.randn(4, 3 + number))


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch counts all compilations of one function together",
)
def test_many_models_of_one_class_are_compiled_apart() -> None:
    models = [bnrewrite.convert(_one_site()) for _ in range(4)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for model in models:
            compiled = torch.compile(  # pyright: ignore[reportCallIssue]
                model, fullgraph=True, backend="aot_eager", isolate_recompiles=True
            )
            for training in (True, False):
                model.train(training)
                compiled(_x(4, 0))


@pytest.mark.parametrize("how", ["inside DDP", "around DDP"])
def test_two_ranks_agree_with_eager(ranks: RankPool, how: str) -> None:
    expected = ranks.run(_compile_rank, 2, "eager")
    allowed = ranks.run(_breaks_of_ddp, 2)[0] if how == "around DDP" else set()
    results = ranks.run(_compile_rank, 2, how, timeout_s=300)
    for (result, breaks), (true, _) in zip(results, expected, strict=True):
        _assert_close(result, true)
        assert breaks <= allowed


def _compiled_before_the_group(rank: int, world_size: int, store: str) -> list[Tensor]:
    dist.barrier()
    dist.destroy_process_group()
    model = bnrewrite.convert(_one_site())
    bn: Any = model.get_submodule("2")
    bn.momentum = 0.1
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    alone = copy.deepcopy(model)
    compiled(_x(4, rank))
    first = bn.running_mean.clone()
    alone(_x(4, rank))
    torch.testing.assert_close(model.state_dict(), alone.state_dict())
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    compiled(_x(4, rank))
    alone(_x(4, rank))
    torch.testing.assert_close(model.state_dict(), alone.state_dict())
    dist.barrier()
    # Both started from local averages, so only the last update is common to the ranks.
    return [bn.running_mean - 0.9 * first]


def test_a_model_that_was_compiled_before_the_group_synchronizes_after(
    ranks: RankPool, tmp_path: Path
) -> None:
    results = ranks.run(_compiled_before_the_group, 2, f"file://{tmp_path}/again")
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def _visible(rank: int = 0, world_size: int = 1) -> list[list[str]]:
    """Names of the ops in the forward and the backward graph of a compiled model."""
    graphs: list[list[str]] = []

    def keep(graph: Any, _: Any) -> Any:
        calls = graph.graph.find_nodes
        names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        # An op that writes to its arguments is wrapped.
        higher = torch.ops.higher_order.auto_functionalized_v2
        names += [str(n.args[0]) for n in calls(op="call_function", target=higher)]
        graphs.append(names)
        return graph

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def boxed(graph: Any, inputs: Any) -> Any:
        return make_boxed_func(keep(graph, inputs))

    model = bnrewrite.convert(_model())
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=boxed), fullgraph=True)
    compiled(_x(4)).sum().backward()
    return graphs


def test_phases_and_collectives_are_visible_in_compiled_graphs(ranks: RankPool) -> None:
    for forward, backward in ranks.run(_visible, 2):
        for graph, phases in (
            (forward, ("moments", "normalize")),
            # Through the activation of one site, and of the other one alone.
            (backward, (("normalize_backward_reduce", "activation_backward_reduce"),)),
            (backward, ("normalize_backward",)),
        ):
            for name in phases:
                names = (name,) if isinstance(name, str) else name
                calls = [
                    n for n in graph if n.split(".")[:2] in [["bnrewrite", one] for one in names]
                ]
                assert len(calls) == 2, (name, graph)
            assert sum("all_gather_into_tensor" in name for name in graph) == 2
            assert sum("wait_tensor" in name for name in graph) == 2


def test_a_site_that_shares_with_nobody_is_one_op_each_way() -> None:
    for graph, name in zip(
        _visible(), ("batch_norm_local", "batch_norm_local_backward"), strict=True
    ):
        ours = [n for n in graph if n.startswith("bnrewrite.")]
        assert ours == [f"bnrewrite.{name}.default"] * 2
        assert not any("c10d" in n for n in graph)


def test_a_residual_network_compiles_with_inductor() -> None:
    torch.manual_seed(0)
    model = bnrewrite.convert(perturb(ResidualNet().double()))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    batches = [torch.randn(4, 3, 8, 8, dtype=torch.float64) for _ in range(2)]
    _assert_close(_train(compiled, batches), _train(model, batches))


def _convert_and_run(model: nn.Module, x: Tensor) -> Tensor:
    return bnrewrite.convert(model)(x)


def test_a_call_of_convert_in_what_is_compiled_is_refused_or_left_out_of_the_graph() -> None:
    x = _x(3)
    expected = bnrewrite.convert(_model())(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(_convert_and_run, backend="eager")(_model(), x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(_convert_and_run, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Call it before compiling, outside"):
        compiled(_model(), x)
