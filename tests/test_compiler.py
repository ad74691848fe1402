"""The backends of torch.compile that hide collectives in backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import bnrewrite
from bnrewrite.compiler import HideCollectives
from tests.models import ResidualNet
from tests.ranks import SUMS, RankPool

BACKENDS = {"bnrewrite": "inductor", "bnrewrite_aot_eager": "aot_eager"}


def _gradients(model: nn.Module, compiled: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = compiled(x)
    (out * torch.sin(torch.arange(out.numel())).view(out.shape)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _same_bits(rank: int, world_size: int, backend: str) -> bool:
    torch.manual_seed(0)
    model = bnrewrite.convert(ResidualNet())
    x = torch.randn(3 + rank, 3, 8, 8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for name in (backend, BACKENDS[backend]):
        torch._dynamo.reset()
        model.load_state_dict(state)
        results.append(_gradients(model, torch.compile(model, backend=name, fullgraph=True), x))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_same_bits(ranks: RankPool, backend: str) -> None:
    assert ranks.run(_same_bits, 2, backend) == [True, True]


def _order(graph: fx.Graph) -> list[str]:
    """Launches, waits and the halves of convolutions, in order."""
    seen = []
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_function" else ""
        if any(one in name for one in SUMS):
            seen.append("launch")
        elif "wait_tensor" in name:
            seen.append("wait")
        elif "convolution_backward" in name:
            input, weight, _ = node.args[-1]
            seen.append("both" if input and weight else "input" if input else "weight")
    return seen


def _orders(rank: int, world_size: int, *, hide: bool) -> list[str]:
    found: list[list[str]] = []

    def compiler(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        if hide:
            HideCollectives()(module.graph)
            module.recompile()
        found.append(_order(module.graph))
        return make_boxed_func(module.forward)

    torch.manual_seed(0)
    model = bnrewrite.convert(nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
    ))  # fmt: skip
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    torch.compile(model, backend=backend, fullgraph=True)(x).square().sum().backward()
    return found[1]


def _both_orders(rank: int, world_size: int) -> list[list[str]]:
    plain = _orders(rank, world_size, hide=False)
    torch._dynamo.reset()
    return [plain, _orders(rank, world_size, hide=True)]


def test_weight_gradients_run_between_launch_and_wait(ranks: RankPool) -> None:
    plain = ["both", "launch", "wait", "both", "launch", "wait", "both"]
    # The last convolution's weight gradient hides the first collective, and so on.
    hidden = ["input", "launch", "weight", "wait", "input", "launch", "weight", "wait"]
    found = ranks.run(_both_orders, 2)
    assert found[0] == found[1]
    assert found[0][0] == plain
    assert found[0][1][:8] == hidden
    assert sorted(found[0][1][8:]) == ["input", "weight"]


def test_graphs_without_collectives_stay_as_they_are() -> None:
    graphs: list[fx.Graph] = []

    def compiler(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        before = [(node.name, node.args) for node in module.graph.nodes]
        HideCollectives()(module.graph)
        assert before == [(node.name, node.args) for node in module.graph.nodes]
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    model = bnrewrite.convert(ResidualNet())
    torch.compile(model, backend=aot_autograd(fw_compiler=compiler))(torch.randn(2, 3, 8, 8))
    assert graphs


def _compile(backend: str, **wanted: Any) -> None:
    torch._dynamo.reset()
    model = bnrewrite.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    torch.compile(model, backend=backend, **wanted)(torch.randn(2, 3, 4, 4)).sum().backward()


WANTED = (
    {"mode": "max-autotune-no-cudagraphs"},
    {"mode": "reduce-overhead"},
    {"options": {"max-autotune": True, "reorder_for_peak_memory": True}},
    {"options": {"trace.enabled": False}},
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_modes_and_options_mean_what_they_mean_to_inductor(
    wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import compile_fx as module

    given: list[dict[str, Any]] = []
    compile_fx = module.compile_fx

    def note(graph: Any, inputs: Any, config_patches: Any = None, **kwargs: Any) -> Any:
        given.append(config_patches)
        # What else they change takes long.
        return compile_fx(graph, inputs, **kwargs)

    monkeypatch.setattr(module, "compile_fx", note)
    _compile("inductor", **wanted)
    _compile("bnrewrite", **wanted)
    theirs, ours = given
    assert theirs
    assert isinstance(ours.pop("post_grad_custom_post_pass"), HideCollectives)
    assert {"reorder_for_peak_memory": False, **theirs} == ours


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("backend", "wanted", "message"),
    [
        ("bnrewrite", {"mode": "nonsense"}, "Unrecognized mode=nonsense, should be one of"),
        ("bnrewrite", {"options": {"nonsense": 1}}, "Unexpected optimization option nonsense"),
        ("bnrewrite", {"options": {"max_autotune": "yes"}}, "Unexpected type of attr max_autotune"),
        (
            "bnrewrite",
            {"options": {"post_grad_custom_post_pass": HideCollectives.uuid}},
            "post_grad_custom_post_pass is already set",
        ),
        ("bnrewrite_aot_eager", {"mode": "max-autotune"}, "does not accept mode='max-autotune'"),
        ("bnrewrite_aot_eager", {"options": {"max_autotune": True}}, "does not accept options="),
    ],
)
def test_what_means_nothing_is_an_error(backend: str, wanted: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        _compile(backend, **wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_default_mode_is_taken_by_both(backend: str) -> None:
    _compile(backend, mode="default")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_pass_in_the_way_is_an_error() -> None:
    from torch._inductor import config

    compiled = torch.compile(bnrewrite.convert(ResidualNet()), backend="bnrewrite")
    # Its own patch: what pytest's monkeypatch leaves behind, configurations take for removed.
    with (
        config.patch(post_grad_custom_post_pass=lambda graph: None),
        pytest.raises(Exception, match="post_grad_custom_post_pass is already set"),
    ):
        compiled(torch.randn(2, 3, 8, 8))
