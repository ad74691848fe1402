"""Models that are graphs already: of ``torch.fx``, of ``torch.export``, and edited later on.

The reference is the unconverted graph in one process on the batches of all ranks, in float64.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bnrewrite
from benchmarks.models import prepare_torchvision
from bnrewrite.sites.schedule import schedule_of
from tests.ranks import CountCollectives, RankPool

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
"""float64 through a few layers; sums over ranks have another order."""


class Net(nn.Module):
    """Two branches that may share a collective, and a BatchNorm that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3)
        self.right = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.bias = nn.Parameter(torch.linspace(-0.5, 0.5, 4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.left(x)) + self.bn2(self.right(x)))
        return F.batch_norm(y.sin(), self.mean, self.var, self.weight, self.bias, True, 0.1, 1e-5)  # pyright: ignore


def _net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def _x(rank: int = 0, num: int = 2) -> Tensor:
    return torch.randn(num, 3, 6, 6, generator=torch.Generator().manual_seed(rank)).double()


def _traced() -> Any:
    return fx.symbolic_trace(_net())


def _exported() -> Any:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(_net(), (_x(),), dynamic_shapes=dynamic).module()


class Switching(fx.GraphModule):
    """Trains with one graph and evaluates with another, as torchvision's feature extractors do."""

    def __init__(self, root: nn.Module, train: fx.Graph, eval: fx.Graph) -> None:
        super().__init__(root, train)
        self.train_graph, self.eval_graph = train, eval

    def train(self, mode: bool = True) -> Any:
        if mode is not self.training:
            self.graph = self.train_graph if mode else self.eval_graph
        return super().train(mode)


def _switching() -> Any:
    graph = _traced().graph
    evaluates = copy.deepcopy(graph)
    _replace(evaluates, torch.sin, torch.cos)
    (call,) = (node for node in evaluates.nodes if node.target is F.batch_norm)
    call.kwargs = {**call.kwargs, "training": False}
    return Switching(_net(), graph, evaluates)


class TwoStreams(nn.Module):
    """Two graphs that do not depend on each other."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.one, self.two = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x.flip(2))


def _replace(graph: fx.Graph, old: Any, new: Any) -> None:
    """Calls ``new`` in place of ``old``."""
    found = [node for node in graph.nodes if node.target in (old, old.__name__)]
    assert found
    for node in found:
        with graph.inserting_after(node):
            node.replace_all_uses_with(graph.call_function(new, node.args))
        graph.erase_node(node)


MODELS: dict[str, Callable[[], Any]] = {
    "traced": _traced,
    "exported": _exported,
    "switching": _switching,
}
BESIDE = {**MODELS, "beside each other": lambda: TwoStreams(_traced)}


def _results(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step."""
    model.zero_grad()
    y = model(x)
    y.pow(3).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"output": y.detach(), **gradients, **_buffers(model)}


def _buffers(model: Any) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _assert_same(model: Any, plain: Any, x: Tensor) -> None:
    torch.testing.assert_close(_results(model, x), _results(plain, x), **CLOSE)


def _assert_all_in_graphs(model: Any, num_collectives: int = 2) -> None:
    report = bnrewrite.report(model)
    assert "3 BatchNorm sites, 3 in captured graphs" in str(report)
    assert f"{num_collectives} forward + {num_collectives} backward" in str(report)


@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_captured_and_rewritten(name: str) -> None:
    model, plain = MODELS[name](), MODELS[name]()
    assert bnrewrite.convert(model) is model
    _assert_all_in_graphs(model)
    for step in range(2):
        _assert_same(model, plain, _x(step))
    bnrewrite.revert(model)
    assert type(model).__mro__[1:] == type(plain).__mro__[1:]  # each has a class of its own
    assert not [key for key in vars(model) if key.startswith("_bnrewrite")]
    _assert_same(model, plain, _x(2))


def _train(rank: int, world_size: int, name: str) -> tuple[dict[str, Tensor], list[str]]:
    model = bnrewrite.convert(BESIDE[name]())
    _results(model, _x(rank))  # ranks agree in the first step
    with CountCollectives() as comm:
        found = _results(model, _x(world_size + rank))
    for parameter, _ in model.named_parameters():
        dist.all_reduce(found[parameter])
    return found, [kind for kind, _, _ in comm.seen]


@pytest.mark.parametrize("name", BESIDE)
def test_two_ranks_train_like_one_process(ranks: RankPool, name: str) -> None:
    results = ranks.run(_train, 2, name)
    plain = BESIDE[name]()
    for start in (0, 2):
        expected = _results(plain, torch.cat([_x(start), _x(start + 1)]))
    outputs = torch.cat([found.pop("output") for found, _ in results])
    torch.testing.assert_close(outputs, expected.pop("output"), **CLOSE)
    for found, kinds in results:
        torch.testing.assert_close(found, expected, **CLOSE)
        assert len(kinds) == 4


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: torch.ops.aten.batch_norm(
            x, m.weight, m.bias, m.mean, m.var, m.training, 0.1, 1e-5, True
        ),
        lambda m, x: torch.ops.aten.batch_norm.default(
            x, m.weight, m.bias, m.mean, m.var, m.training, 0.1, 1e-5, cudnn_enabled=False
        ),
    ],
    ids=["packet", "overload"],
)
def test_calls_of_the_operator_are_sites(call: Callable[..., Tensor]) -> None:
    class Calls(Net):
        def forward(self, x: Tensor) -> Tensor:
            return call(self, self.left(x)).relu()

    model, plain = bnrewrite.convert(Calls().double()), Calls().double()
    plain.load_state_dict(model.state_dict())
    assert "3 BatchNorm sites, 1 in captured graphs" in str(bnrewrite.report(model))
    for training in (True, False, True):
        x = _x(int(training))
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x), **CLOSE)
        torch.testing.assert_close(_buffers(model), _buffers(plain), **CLOSE)


def test_a_graph_that_is_edited_is_captured_again() -> None:
    model, plain = bnrewrite.convert(_traced()), _traced()
    _assert_same(model, plain, _x())
    for one in (model, plain):
        _replace(one.graph, torch.sin, torch.cos)
        one.recompile()
    _assert_same(model, plain, _x(1))
    assert "cos" in model.code
    _assert_same(bnrewrite.revert(model), plain, _x(2))


def _edited(rank: int, world_size: int) -> dict[str, Tensor]:
    model = bnrewrite.convert(_traced())
    _results(model, _x(rank))
    _replace(model.graph, torch.sin, torch.cos)
    model.recompile()
    with CountCollectives() as comm:
        found = _results(model, _x(2 + rank))
    assert len(comm.seen) == 4
    for parameter, _ in model.named_parameters():
        dist.all_reduce(found[parameter])
    return found


def test_ranks_go_on_together_after_an_edit(ranks: RankPool) -> None:
    plain = _traced()
    _results(plain, torch.cat([_x(0), _x(1)]))
    _replace(plain.graph, torch.sin, torch.cos)
    plain.recompile()
    expected = _results(plain, torch.cat([_x(2), _x(3)]))
    outputs = []
    for found in ranks.run(_edited, 2):
        outputs.append(found.pop("output"))
        torch.testing.assert_close(found, {key: expected[key] for key in found}, **CLOSE)
    torch.testing.assert_close(torch.cat(outputs), expected["output"], **CLOSE)


def _edited_alone(rank: int, world_size: int) -> str:
    model = bnrewrite.convert(_traced())
    _results(model, _x(rank))
    if rank == 1:
        (call,) = (node for node in model.graph.nodes if node.target is F.batch_norm)
        call.replace_all_uses_with(call.args[0])
        model.graph.erase_node(call)
        model.recompile()
    try:
        _results(model, _x(2 + rank))
    except bnrewrite.ScheduleError as error:
        return str(error)
    return "no error"


def test_an_edit_on_one_rank_is_an_error_that_names_the_graph(ranks: RankPool) -> None:
    for said in ranks.run(_edited_alone, 2):
        assert "batch_norm" in said
        assert "rank" in said


def test_what_cannot_be_captured_any_more_is_said() -> None:
    model, plain = bnrewrite.convert(_traced()), _traced()
    for one in (model, plain):
        _replace(one.graph, torch.sin, _branches)
    plain.recompile()
    with pytest.warns(UserWarning, match="the graph as it is now cannot be captured again"):
        model.recompile()
    _assert_same(model, plain, _x())
    for one in (model, plain):
        _replace(one.graph, _branches, torch.sin)
        one.recompile()
    _assert_same(model, plain, _x())
    assert bnrewrite.report(model)


def _branches(x: Tensor) -> Tensor:
    return x.sin() if x.sum() > 0 else x


@pytest.mark.parametrize("wrapped", [False, True])
def test_evaluation_may_have_a_graph_of_its_own(wrapped: bool) -> None:
    def make() -> Any:
        return nn.Sequential(_switching(), nn.BatchNorm2d(4).double()) if wrapped else _switching()

    model, plain = bnrewrite.convert(make()), make()
    inner: Any = model[0] if wrapped else model
    for training in (True, False, True, False, True):
        model.train(training)
        plain.train(training)
        _assert_same(model, plain, _x(int(training)))
        assert ("sin" in inner.code) is training
    # Each graph was captured once, and agreed on once.
    assert [one.number for one in vars(inner)["_bnrewrite_known"].values()] == [0, 1]


def _evaluate_alone(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    model = bnrewrite.convert(_switching())
    found = []
    for step in range(3):
        found.append(_results(model, _x(2 * step + rank)))
        if rank == 0:
            model.eval()
            with torch.no_grad():
                model(_x(9))
            model.train()
    return found


def test_one_rank_may_evaluate_with_another_graph(ranks: RankPool) -> None:
    results = ranks.run(_evaluate_alone, 2)
    plain = _switching()
    for step in range(3):
        expected = _results(plain, torch.cat([_x(2 * step), _x(2 * step + 1)]))["output"]
        outputs = torch.cat([found[step]["output"] for found in results])
        torch.testing.assert_close(outputs, expected, **CLOSE)


HOW: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning"
)  # torch's copies of what it exports
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["traced", "exported"])
def test_copies_are_converted(name: str, how: str) -> None:
    if name == "exported" and how == "pickle":
        pytest.skip("torch cannot pickle what it exports")
    model, plain = bnrewrite.convert(MODELS[name]()), MODELS[name]()
    _assert_same(model, plain, _x())
    made = HOW[how](model)
    _assert_all_in_graphs(made)
    assert (schedule_of(made) is schedule_of(model)) is (how == "copy")
    _assert_same(made, copy.deepcopy(plain), _x(1))
    if how != "copy":
        _assert_same(model, plain, _x(1))
    # A graph of its own.
    _replace(made.graph, torch.sin if name == "traced" else torch.ops.aten.sin.default, torch.cos)
    made.recompile()
    assert "cos" not in model.code or how == "copy"
    reverted = bnrewrite.revert(made)
    assert isinstance(reverted, fx.GraphModule)
    assert not [key for key in vars(reverted) if key.startswith("_bnrewrite")]


class Around(nn.Module):
    """A model with a graph inside, whose own BatchNorm follows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _traced()
        self.bn = nn.BatchNorm2d(4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.body(x)).relu()


def test_feature_extractors_of_torchvision_switch_graphs() -> None:
    prepare_torchvision()
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    models = pytest.importorskip("torchvision.models")

    def make() -> Any:
        torch.manual_seed(0)
        nodes = ["layer2", "layer4"]
        return extraction.create_feature_extractor(models.resnet18(), nodes).double()

    model, plain = bnrewrite.convert(make()), make()
    x = torch.randn(2, 3, 64, 64).double()
    for training in (True, False, True):
        results = (one.train(training)(x) for one in (model, plain))
        torch.testing.assert_close(*results, **CLOSE)
        torch.testing.assert_close(_buffers(model), _buffers(plain), **CLOSE)
        assert _graph_of(model).left_because(model) is None
    made = copy.deepcopy(model)
    torch.testing.assert_close(made.eval()(x), plain.eval()(x), **CLOSE)
    assert "20 BatchNorm sites, 20 in captured graphs" in str(bnrewrite.report(made))


def _graph_of(model: nn.Module) -> Any:
    """The training graph of a model."""
    return vars(model)["_bnrewrite_owner"].train


@pytest.mark.parametrize("how", ["none", "deepcopy", "pickle"])
def test_graphs_beside_each_other_share_collectives(how: str) -> None:
    make = _switching if how == "none" else _traced
    model, plain = bnrewrite.convert(TwoStreams(make)), TwoStreams(make)
    assert "2 forward + 2 backward for 6 evaluations" in str(bnrewrite.report(model))
    if how != "none":
        model = HOW[how](model)
    for training in (True, False, True):
        model.train(training)
        plain.train(training)
        _assert_same(model, plain, _x(int(training)))
        runs = _graph_of(model).left_because(model) is None
        assert runs is (training or make is _traced)
    for one in (model.two, plain.two):
        _replace(one.graph, torch.sin, torch.cos)
        one.recompile()
    assert _graph_of(model).left_because(model) == "forward of two changed"
    _assert_same(model, plain, _x(2))


@pytest.mark.parametrize("how", ["none", "deepcopy", "pickle"])
def test_forwards_that_call_graphs_are_captured(how: str) -> None:
    model, plain = bnrewrite.convert(Around()), Around()
    if how != "none":
        model = HOW[how](model)
    assert "4 BatchNorm sites, 4 in captured graphs" in str(bnrewrite.report(model))
    assert _graph_of(model).left_because(model) is None
    _assert_same(model, plain, _x())
    for body in (model.body, plain.body):
        _replace(body.graph, torch.sin, torch.cos)
        body.recompile()
    _assert_same(model, plain, _x(1))


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning"
)  # torch's copies of what it exports
def test_graphs_that_run_in_an_interpreter_are_named() -> None:
    model = torch.export.unflatten(torch.export.export(_net(), (_x(),)))
    with pytest.warns(UserWarning, match=r"^1.* runs a graph in torch\.fx\.Interpreter"):
        model = bnrewrite.convert(nn.Sequential(nn.BatchNorm2d(3).double(), model))
    assert "1.bn1" in str(bnrewrite.report(model))


def test_other_operators_in_a_graph_are_named() -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0]

    with pytest.warns(UserWarning, match="itself calls native_batch_norm, which uses local"):
        bnrewrite.convert(fx.symbolic_trace(Calls()))


def test_compiled_graphs_follow_edits() -> None:
    model, plain = bnrewrite.convert(_traced()), _traced()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(_x()), plain(_x()), **CLOSE)
    for one in (model, plain):
        _replace(one.graph, torch.sin, torch.cos)
        one.recompile()
    torch.testing.assert_close(compiled(_x(1)), plain(_x(1)), **CLOSE)
    torch.testing.assert_close(_buffers(model), _buffers(plain), **CLOSE)
