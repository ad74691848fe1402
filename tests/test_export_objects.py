"""Exports of models whose modules hang on objects, containers, closures and graph modules."""

import collections
import types
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnrewrite

onnxruntime = pytest.importorskip("onnxruntime")

NAMES = ["weight", "bias", "running_mean", "running_var"]


def _image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _run(report: Any, x: Tensor) -> Any:
    session = onnxruntime.InferenceSession(report.model.SerializeToString())
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def _assert_exported(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """Another input than the example gives what the model gives in eval mode."""
    report = bnrewrite.export_onnx(model, (x,), **options)
    other = x.flip(0).mul(2).add(1)
    with torch.no_grad():
        expected = model.eval()(other)
    (found,) = _run(report, other)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-5)
    return report


class Catcher(nn.Module):
    """A hook keeps what a layer computes, in a container that the model reads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.features: Any = {} if kind == "dict" else []
        features: Any = self.features

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if kind == "dict":
                features["bn"] = output
            else:
                features[:] = [output]

        self.bn.register_forward_hook(keep)

    def forward(self, x: Tensor) -> Tensor:
        self.bn(x)
        return self.features["bn" if isinstance(self.features, dict) else 0] * 2


@pytest.mark.parametrize("kind", ["dict", "list"])
@pytest.mark.parametrize("used", [False, True])
def test_what_a_hook_and_the_model_share_their_copies_share(kind: str, used: bool) -> None:
    model = Catcher(kind).eval()
    if used:
        with torch.no_grad():
            model(_image() * 5)
    _assert_exported(model, _image())


def test_two_hooks_share_a_variable() -> None:
    seen: Any = None

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal seen
        seen = output

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.add(output, seen)

    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[0].register_forward_hook(keep)
    model[1].register_forward_hook(add)
    _assert_exported(model, _image())


Pair = collections.namedtuple("Pair", ("bn", "name"))


class Holder:
    """An object of the user's."""

    def __init__(self, bn: nn.Module) -> None:
        self.bn = bn


class Layers(list):
    """A list of the user's."""


class Held(nn.Module):
    """A layer that is registered, and called by way of something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.by: Any = {
            "object": Holder(self.bn),
            "namedtuple": Pair(self.bn, "bn"),
            "namespace": types.SimpleNamespace(bn=self.bn),
            "list": Layers([self.bn]),
            "method": self.bn.forward,
            "itself": [self.bn],
        }[kind]
        if kind == "itself":
            self.by.append(self.by)

    def forward(self, x: Tensor) -> Tensor:
        held: Any = self.by
        if callable(held):
            return held(x)  # pyright: ignore[reportReturnType]
        return (held[0] if isinstance(held, list) else held.bn)(x)


@pytest.mark.parametrize("kind", ["object", "namedtuple", "namespace", "list", "method", "itself"])
@pytest.mark.parametrize("training", [False, True])
def test_modules_in_objects_are_exported_in_eval_mode(kind: str, training: bool) -> None:
    model = Held(kind).train(training)
    report = _assert_exported(model, _image())
    assert {f"bn.{name}" for name in NAMES} == {i.name for i in report.model.graph.initializer}
    assert int(model.get_buffer("bn.num_batches_tracked")) == 0


class Parent(nn.Module):
    """A model whose child calls another child, by way of it."""

    def __init__(self, refer: Any) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.child = Child()
        vars(self.child)["parent"] = refer(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)


class Child(nn.Module):
    """Refers to its parent weakly, as modules do to avoid cycles."""

    parent: Any

    def forward(self, x: Tensor) -> Tensor:
        parent: Any = self.parent() if type(self.parent) is weakref.ref else self.parent
        return parent.bn(x) * 2


@pytest.mark.parametrize("refer", [weakref.ref, weakref.proxy])
@pytest.mark.parametrize("converted", [False, True])
def test_a_weak_reference_is_one_to_the_copy(refer: Any, converted: bool) -> None:
    model = Parent(refer)
    if converted:
        bnrewrite.convert(model)
    report = _assert_exported(model, _image())
    assert {f"bn.{name}" for name in NAMES} <= {i.name for i in report.model.graph.initializer}


@pytest.mark.parametrize("refer", [weakref.ref, weakref.proxy])
def test_weak_references_to_what_is_gone_or_not_of_the_model(refer: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    keeper = Holder(model[0])
    if refer is weakref.ref:
        # torch.export itself asks a proxy what it is.
        vars(model)["gone"] = refer(Holder(model[0]))
    vars(model[0])["keeper"] = refer(keeper)

    def double(bn: Any, args: Any, y: Tensor) -> Tensor:
        keeper = bn.keeper() if refer is weakref.ref else bn.keeper
        return y * 2 if keeper.bn is bn else y

    model[0].register_forward_hook(double)
    _assert_exported(model, _image())


def test_an_object_that_keeps_activations_keeps_its_own() -> None:
    class Keeper:
        def __init__(self) -> None:
            self.kept: Any = None

        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.kept = output

    keeper = Keeper()
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].register_forward_hook(keeper)
    kept = model.eval()(_image())
    bnrewrite.export_onnx(model, (_image(),))
    assert keeper.kept is kept


@pytest.mark.parametrize("where", ["whole", "child", "converted", "program"])
def test_graph_modules(where: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    if where == "converted":
        bnrewrite.convert(network)
    model: Any = torch.fx.symbolic_trace(network)
    if where == "child":
        model = nn.Sequential(model, nn.BatchNorm2d(4)).eval()
    if where == "program":
        program: Any = torch.export.export(network, (_image(),)).module()
        report = bnrewrite.export_onnx(program, (_image(),))
        np.testing.assert_allclose(
            _run(report, _image())[0], network(_image()).detach().numpy(), rtol=1e-3, atol=1e-5
        )
    else:
        report = _assert_exported(model, _image())
    assert report.num_batch_norm == 1 + (where == "child")


def test_an_example_keeps_no_marks() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else x * 2

    x = _image()
    with pytest.raises(bnrewrite.ExportError):
        bnrewrite.export_onnx(Fails(), (x,), dynamic_shapes=[{0: "batch"}])
    assert not [name for name in x.__dict__ if name.startswith("_dynamo")]
    report = bnrewrite.export_onnx(nn.BatchNorm2d(3), (x,))
    assert report.inputs[0].shape == (2, 3, 8, 8)


class Asks(nn.Module):
    """A forward that asks for a size."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y * 2 if x.shape[-1] > 5 else y


def test_the_report_names_the_range_of_a_size_that_the_code_asks_for() -> None:
    axes = [{0: "n", 3: "width"}]
    report = bnrewrite.export_onnx(Asks(), (_image(),), dynamic_shapes=axes)
    assert report.ranges == {"width": (6, None)}
    assert "only for            width from 6" in str(report)
    assert bnrewrite.export_onnx(nn.BatchNorm2d(3), (_image(),), dynamic_shapes=axes).ranges == {}


@pytest.mark.parametrize("fold", [False, True])
def test_pieces_may_be_outputs(fold: bool) -> None:
    class Splits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.bn(x).chunk(2, 2)

    axes = [{2: "height"}]
    report = bnrewrite.export_onnx(Splits(), (_image(),), dynamic_shapes=axes, fold=fold)
    assert len(report.outputs) == 2


def test_a_bias_that_a_gemm_broadcasts_is_folded() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias = nn.Parameter(torch.ones(1))
    report = _assert_exported(model, torch.randn(2, 3), fold=True)
    assert report.num_folded == 1


def test_a_bfloat16_input_says_how_to_go_on() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() * 2

    x = _image().bfloat16()
    with pytest.raises(bnrewrite.ExportError, match=r"'x' is torch\.bfloat16.*verify=False"):
        bnrewrite.export_onnx(Casts(), (x,), opset_version=22)
    assert bnrewrite.export_onnx(Casts(), (x,), opset_version=22, verify=False).verified == ()


@pytest.mark.parametrize("variance", [0.0, 1e-3])
def test_float64_is_compared_as_exactly_as_the_file_is(variance: float) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, eps=1e-3), nn.Hardswish()).double()
    model[0].running_var.fill_(variance)  # pyright: ignore
    report = bnrewrite.export_onnx(model, (_image().double(),))
    assert report.max_rel is not None
    assert report.max_rel < 1e-6


def test_weights_do_not_replace_a_file_of_somebody_else(tmp_path: Any) -> None:
    place = tmp_path / "model.onnx.data"
    place.write_text("mine")
    with pytest.raises(
        bnrewrite.ExportError, match=r"model\.onnx\.data.*does not belong to a model"
    ):
        bnrewrite.export_onnx(
            nn.BatchNorm2d(3), (_image(),), tmp_path / "model.onnx", external_data=True
        )
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx.data"]
    assert place.read_text() == "mine"
