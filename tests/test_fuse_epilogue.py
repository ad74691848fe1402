"""Sums and activations that become part of the BatchNorm before them, and those that must not."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import bnrewrite
from tests.models import ResidualNet, perturb
from tests.parity import assert_same_training
from tests.ranks import RankPool

Tail = Callable[["Net", Tensor, Tensor], Any]


@fx.wrap
def mean(x: Tensor) -> int:
    """No mean."""
    return x.dim()


class Net(nn.Module):
    """A convolution, a BatchNorm, and whatever ``tail`` does with its result and the input."""

    def __init__(self, tail: Tail, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.act = nn.ReLU() if act is None else act
        self.nothing = nn.Identity()
        self.last = nn.Conv2d(3, 3, 1)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        # What follows must not see a change of x, and x itself must survive in-place tails.
        x = x * 1
        return self.last(self.tail(self, self.bn(self.conv(x)), x))


def _inputs(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(n, 3, 5, 7),), {}


def _ops(model: nn.Module, owner: str = "") -> list[str]:
    """Names of our ops in the training graph of ``owner``, in order."""
    return [
        node.target.name().removeprefix("bnrewrite::")
        for node in bnrewrite.graphs(model)[owner].graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "bnrewrite"
    ]


def _convert(model: nn.Module) -> nn.Module:
    """With this pass alone: the ones before it put what overlaps with other work out of reach."""
    return bnrewrite.convert(model, passes=("fuse_epilogue",))


def _epilogue(model: nn.Module) -> tuple[bool, str]:
    """Whether the one fused node has a residual, and the name of its activation."""
    (node,) = bnrewrite.graphs(model)[""].graph.find_nodes(
        op="call_function", target=torch.ops.bnrewrite.batch_norm_act.default
    )
    return node.args[11] is not None, node.args[12]


def _reasons(model: nn.Module) -> list[str]:
    passes = {one.name: one for one in bnrewrite.report(model).passes}
    return [skip.reason for skip in passes["fuse_epilogue"].skipped]


def _module(act: nn.Module) -> tuple[Tail, nn.Module]:
    return (lambda self, y, x: self.act(y)), act


def _function(function: Callable[[Tensor], Tensor]) -> tuple[Tail, None]:
    return (lambda self, y, x: function(y)), None


def _sum(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tail, None]:
    return (lambda self, y, x: F.relu(function(y, x))), None


def _iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


FUSED: dict[str, tuple[Tail, nn.Module | None]] = {
    "nn.ReLU": _module(nn.ReLU()),
    "nn.ReLU in place": _module(nn.ReLU(inplace=True)),
    "nn.ReLU6": _module(nn.ReLU6(inplace=True)),
    "nn.LeakyReLU": _module(nn.LeakyReLU(0.2)),
    "nn.SiLU": _module(nn.SiLU(inplace=True)),
    "nn.GELU": _module(nn.GELU()),
    "nn.GELU tanh": _module(nn.GELU("tanh")),
    "nn.Hardswish": _module(nn.Hardswish()),
    "nn.Hardtanh": _module(nn.Hardtanh(0.0, 6.0)),
    "F.relu": _function(F.relu),
    "F.relu in place": _function(lambda y: F.relu(y, inplace=True)),
    "F.relu6": _function(F.relu6),
    "F.leaky_relu": _function(lambda y: F.leaky_relu(y, 0.2, True)),
    "F.leaky_relu of a negative slope": _function(lambda y: F.leaky_relu(y, -0.2)),
    "F.silu": _function(F.silu),
    "F.gelu": _function(lambda y: F.gelu(y, approximate="tanh")),
    "F.hardswish": _function(F.hardswish),
    "F.hardtanh": _function(lambda y: F.hardtanh(y, 0.0, 6.0)),
    "torch.relu": _function(torch.relu),
    "torch.relu_": _function(torch.relu_),
    ".relu": _function(lambda y: y.relu()),
    ".relu_": _function(lambda y: y.relu_()),
    "y + x": _sum(lambda y, x: y + x),
    "x + y": _sum(lambda y, x: x + y),
    "y += x": _sum(_iadd),
    "torch.add": _sum(torch.add),
    ".add": _sum(lambda y, x: x.add(y)),
    ".add_": _sum(lambda y, x: y.add_(x)),
    "a sum alone": ((lambda self, y, x: x + y), None),
    "broadcast": _sum(lambda y, x: y + x.mul(2).relu().add(x)[:, :, :1, :1].relu()),
    "a quotient": _sum(lambda y, x: y + x / 2),
    "a mean": _sum(lambda y, x: y + x.mean((2, 3), keepdim=True)),
    "a product of matrices": _sum(lambda y, x: y + torch.matmul(x, x.transpose(2, 3) @ x)),
    "a sum that the backward needs": ((lambda self, y, x: F.silu(y + x)), None),
    "nothing between": ((lambda self, y, x: self.act(self.nothing(y) + x)), nn.ReLU(inplace=True)),
}

LEFT: dict[str, tuple[Tail, nn.Module | None, str]] = {
    "read twice": (lambda self, y, x: F.relu(y) + y, None, "used in several places"),
    "the sum is read twice": (
        lambda self, y, x: (lambda z: F.silu(z) * z)(F.relu(y) * y),
        None,
        "used in several places",
    ),
    "into another value": (
        lambda self, y, x: F.relu(_iadd(x * 2, y)),
        None,
        "added in place to another value",
    ),
    "an unknown value": (
        lambda self, y, x: y + x.size(0),
        None,
        "may not be a tensor",
    ),
    "a number by division": (
        lambda self, y, x: y + x.size(0) / 2,
        None,
        "may not be a tensor",
    ),
    "a function that only has the name of one of torch's": (
        lambda self, y, x: y + mean(x),
        None,
        "may not be a tensor",
    ),
}

UNRELATED: dict[str, Tail] = {
    "a convolution": lambda self, y, x: self.last(y),
    "a scalar": lambda self, y, x: y + 1,
    "itself": lambda self, y, x: y + y,
    "scaled": lambda self, y, x: torch.add(y, x, alpha=2),
    "another activation": lambda self, y, x: torch.tanh(y),
    "another range": lambda self, y, x: F.hardtanh(y, -1.0, 6.0),
    "nothing": lambda self, y, x: self.nothing(y),
}


class TestFused:
    """One node in the graph, the same training."""

    @pytest.mark.parametrize("form", FUSED)
    def test_every_form(self, form: str) -> None:
        tail, act = FUSED[form]
        model = assert_same_training(
            lambda: Net(tail, copy.deepcopy(act)), _inputs, convert=_convert
        )
        assert _ops(model) == ["batch_norm_act"]
        assert not _reasons(model)

    def test_a_residual_network(self) -> None:
        model = assert_same_training(
            lambda: perturb(ResidualNet()), lambda n: ((torch.randn(n, 3, 8, 8),), {})
        )
        assert _ops(model, "layer1") == ["batch_norm_act", "batch_norm_act"]
        # The head's has nothing behind it; the projection's is added to that of the block.
        (summary,) = (one for one in bnrewrite.report(model).passes if one.name == "fuse_epilogue")
        assert (summary.num_rewritten, summary.skipped) == (ResidualNet.NUM_SITES - 2, ())

    def test_a_sequence(self) -> None:
        def make() -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(inplace=True))

        model = assert_same_training(make, _inputs)
        assert _ops(model) == ["batch_norm_act"]

    def test_branches_that_meet_become_one_node_with_the_other_as_residual(self) -> None:
        class Meet(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return F.relu(self.a(x) + self.b(x * 2))

        model = _convert(Meet())
        assert _ops(model) == ["batch_norm", "batch_norm_act"]
        assert_same_training(Meet, _inputs, convert=_convert)

    def test_results_do_not_depend_on_the_pass(self) -> None:
        x = torch.randn(4, 3, 8, 8)
        results = []
        for passes in ((), ("fuse_epilogue",), None):
            torch.manual_seed(0)
            model = bnrewrite.convert(perturb(ResidualNet()), passes=passes)
            y = model(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
        for others in results[1:]:
            for one, other in zip(results[0], others, strict=True):
                # Some ops in place of others: the roundings of a few float32 operations.
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def test_copies_pickles_and_revert(self) -> None:
        model = bnrewrite.convert(perturb(ResidualNet()))
        x = torch.randn(4, 3, 8, 8)
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert _ops(same, "layer1") == ["batch_norm_act", "batch_norm_act"]
            torch.testing.assert_close(same(x), copy.deepcopy(model)(x))
        bnrewrite.convert(model)
        assert _ops(model, "layer1") == ["batch_norm_act", "batch_norm_act"]
        assert type(bnrewrite.revert(model).layer1).__name__ == "Block"

    def test_off_switch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BNREWRITE_DISABLE", "fuse_epilogue")
        model = bnrewrite.convert(Net(*FUSED["y + x"]))
        assert _ops(model) == ["batch_norm"]


class TestLeft:
    """What must stay as it is: reported if it was near, with the reason."""

    @pytest.mark.parametrize("form", LEFT)
    def test_near_misses(self, form: str) -> None:
        tail, act, reason = LEFT[form]
        model = assert_same_training(
            lambda: Net(tail, copy.deepcopy(act)), _inputs, convert=_convert
        )
        assert any(reason in one for one in _reasons(model)), _reasons(model)

    @pytest.mark.parametrize("form", UNRELATED)
    def test_other_nodes_are_not_mentioned(self, form: str) -> None:
        model = assert_same_training(lambda: Net(UNRELATED[form]), _inputs, convert=_convert)
        assert _ops(model) == ["batch_norm"]
        assert not _reasons(model)

    def test_what_it_adds_changes_before_the_activation(self) -> None:
        """The sum cannot run at the place of the activation, the rest can at that of the sum."""

        def tail(self: Net, y: Tensor, x: Tensor) -> Tensor:
            other = x * 2
            z = y + other
            other.mul_(2)
            return F.relu(z) + other

        model = assert_same_training(lambda: Net(tail), _inputs, convert=_convert)
        assert _epilogue(model) == (True, "identity")

    def test_a_hook_on_the_activation(self) -> None:
        model = Net(*FUSED["nn.ReLU"])
        model.act.register_forward_hook(lambda module, args, output: None)
        bnrewrite.convert(model)
        assert _ops(model) == ["batch_norm"]
        assert _reasons(model) == ["what follows it has hooks, which only a call would run"]

    def test_shuffled_statistics(self) -> None:
        model = bnrewrite.convert(Net(*FUSED["nn.ReLU"]), mode="shuffle")
        assert _ops(model) == ["shuffle_batch_norm"]
        assert _reasons(model) == ["its statistics come from another rank"]

    def test_an_activation_to_keep(self) -> None:
        model = bnrewrite.convert(Net(*FUSED["nn.ReLU"]), keep=["act"])
        assert _ops(model) == ["batch_norm"]
        assert _reasons(model) == ["what follows it is listed in keep"]

    def test_an_input_that_changes_in_place_stays_before_the_change(self) -> None:
        """The BatchNorm cannot run at the place of the sum: its input has changed by then."""

        class Changing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                x = x * 1
                y = self.bn(x)
                before = x + 0
                x += 1
                return F.relu(y + before)

        model = Changing()
        plain = copy.deepcopy(model)
        _convert(model)
        assert _ops(model) == ["batch_norm"]
        assert _reasons(model) == ["other operations must run between it and what follows it"]
        # Without gradients, for which torch wants the input as it was.
        with torch.no_grad():
            x = torch.randn(4, 3, 5, 7)
            torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


class TestRunTime:
    """The forward falls back to the original where something has changed since the conversion."""

    def _converted(self, act: nn.Module) -> tuple[Net, Net]:
        model = Net((lambda self, y, x: self.act(y)), act)
        plain = copy.deepcopy(model)
        assert _ops(bnrewrite.convert(model)) == ["batch_norm_act"]
        return model, plain

    def _assert_same(self, model: Net, plain: Net) -> None:
        x = torch.randn(4, 3, 5, 7)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)

    def test_a_hook_that_comes_later_runs(self) -> None:
        model, plain = self._converted(nn.ReLU())
        seen: list[Any] = []
        model.act.register_forward_hook(lambda module, args, output: seen.append(output))
        self._assert_same(model, plain)
        assert len(seen) == 1

    def test_another_slope(self) -> None:
        model, plain = self._converted(nn.LeakyReLU(0.1))
        for one in (model, plain):
            setattr(one.act, "negative_slope", 0.7)  # noqa: B010
        self._assert_same(model, plain)

    def test_another_module(self) -> None:
        model, plain = self._converted(nn.ReLU())
        model.act = plain.act = nn.Tanh()
        self._assert_same(model, plain)

    def test_modules_of_one_structure_but_another_slope(self) -> None:
        def make(slope: float) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(slope))

        model = nn.Sequential(make(0.1), make(0.6))
        plain = copy.deepcopy(model)
        bnrewrite.convert(model)
        x = torch.randn(4, 3, 5, 7)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("other", [1.5, 2])
    def test_a_residual_that_is_a_number_this_time(self, other: float) -> None:
        class Adds(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm1d(3)

            def forward(self, x: Tensor, y: Any) -> Tensor:
                return F.relu(self.bn(x) + y)

        model = Adds()
        plain = copy.deepcopy(model)
        bnrewrite.convert(model)
        assert _ops(model) == ["batch_norm_act"]
        x = torch.randn(4, 3)
        for y in (torch.randn(4, 3), other):
            torch.testing.assert_close(model(x, y), plain(x, y), rtol=1e-5, atol=1e-5)


def _train(rank: int, world_size: int, passes: tuple[str, ...]) -> list[Tensor | None]:
    """Loss gradients of a network whose second rank holds fewer images and whose third none."""
    torch.manual_seed(0)
    model = bnrewrite.convert(perturb(ResidualNet()).double(), passes=passes)
    torch.manual_seed(rank)
    x = torch.randn((4, 1, 0)[rank], 3, 8, 8, dtype=torch.float64)
    y = model(x)
    (y * torch.sin(torch.arange(y.numel()).view_as(y))).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


def test_ranks_agree_with_and_without_the_pass(ranks: RankPool) -> None:
    results = [ranks.run(_train, 3, passes) for passes in ((), ("fuse_epilogue",))]
    for plain, fused in zip(*results, strict=True):
        for one, other in zip(plain, fused, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class Gives(nn.Module):
    """A shortcut that gives what it was made with."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return x * 2 if isinstance(self.value, str) else self.value


class Shortcut(nn.Module):
    """A residual block whose shortcut is a module of any class."""

    def __init__(self, value: Any, twice: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.shortcut = Gives(value)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x) * 2 if self.twice else self.shortcut(x)
        y, z = self.bn(self.conv(x)), self.bn2(self.conv2(x))
        return F.relu(y + shortcut) * (z + shortcut)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("value", ["tensor", 0, 0.1, True, np.float32(0.1)], ids=repr)
@pytest.mark.parametrize("passes", [None, ("fuse_epilogue",)], ids=["all", "alone"])
def test_a_shortcut_may_give_a_number(
    value: Any, twice: bool, passes: tuple[str, ...] | None
) -> None:
    plain = perturb(Shortcut(value, twice))
    model = bnrewrite.convert(copy.deepcopy(plain), mode="local", passes=passes)
    apart = bnrewrite.convert(copy.deepcopy(plain), mode="local", passes=())
    x = torch.randn(4, 3, 5, 7)
    expected = plain(x)
    torch.testing.assert_close(model(x), expected)
    if type(value) in (str, float) and passes is None:
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
    assert any(name in _ops(model) for name in ("batch_norm_act", "finish_batch_norm"))
    # Kernels round in other places than torch's, but numbers change no dtype.
    x = x.bfloat16()
    torch.testing.assert_close(model.bfloat16()(x), apart.bfloat16()(x), rtol=0.02, atol=0.02)


def test_a_shortcut_that_gives_nothing_cannot_be_added() -> None:
    model = _convert(Shortcut(None, False))
    with pytest.raises(TypeError, match="'NoneType'"):
        model(torch.randn(4, 3, 5, 7))


def test_a_forward_that_was_replaced_in_torch_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(nn.ReLU.forward)
    def doubled(self: nn.ReLU, input: Tensor) -> Tensor:
        return input * 2

    monkeypatch.setattr(nn.ReLU, "forward", doubled)
    plain = Net(lambda self, y, x: self.act(y))
    model = bnrewrite.convert(copy.deepcopy(plain))
    x = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(model(x), plain(x))
