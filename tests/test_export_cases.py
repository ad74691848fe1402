"""Layers, dtypes, opsets, folding, wrappers and inputs of every kind, each compared by the export.

``export_onnx`` raises unless onnxruntime gives the outputs of the user's model, here on two batch
sizes, so these tests look at what the graph is made of.
"""

from typing import Any

import onnx
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import bnrewrite
from bnrewrite import ExportReport, export_onnx
from tests.export_models import Block, Mixed, initializers, operators, random_image, randomize


class Shared(nn.Module):
    """One BatchNorm and one convolution used twice: only the first use can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.again = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.bn(self.again(self.bn(self.again(x))))


class ReadTwice(nn.Module):
    """The convolution's output has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) + x


class Tied(nn.Module):
    """Two linear layers share their weight: scaling it for one would change the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.second(self.first(x)))


class ReturnsWeight(nn.Module):
    """The convolution's weight is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(self.conv(x)), self.conv.weight


class Chooses(nn.Module):
    """Layers in the branches of a condition on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn1 = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        def positive(x: Tensor) -> Tensor:
            return self.bn1(self.conv(x))

        return torch.cond(x.sum() > 0, positive, lambda x: self.bn2(x * 2), (x,))


class Functional(nn.Module):
    """``F.batch_norm`` with the module's own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]))
        self.register_buffer("var", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.get_buffer("mean"), self.get_buffer("var")
        return F.batch_norm(self.conv(x), mean, var, training=self.training)


class Standardized(nn.Module):
    """Weight standardization: a batch_norm on weights is no site."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random_image(4, 3, 3, 3))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.view(1, 4, -1)
        weight = F.batch_norm(flat, None, None, training=True).view_as(self.weight)
        return self.bn(F.conv2d(x, weight))


class Activated(nn.BatchNorm2d):
    """A subclass with a forward of its own, as timm's BatchNormAct2d."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def without_bias(num_features: int) -> nn.Module:
    """``nn.BatchNorm2d(num_features, bias=False)``, which torch 2.11 does not know."""
    bn = nn.BatchNorm2d(num_features)
    bn.bias = None
    return bn


def takes_eps_0() -> bool:
    """Whether torch does; 2.11 does not."""
    try:
        F.batch_norm(IMAGE, torch.zeros(3), torch.ones(3), eps=0)
    except ValueError:
        return False
    return True


def layers(*parts: nn.Module) -> Any:
    return nn.Sequential(*parts)


IMAGE, GROUPED = random_image(), random_image(2, 4, 6, 5)
FREE = {"track_running_stats": False}

# name: model, example, then BatchNormalization kept, folded and batch statistics with fold=True
CASES = {
    "(N, C)": (lambda: layers(nn.Linear(5, 6), nn.BatchNorm1d(6)), random_image(3, 5), 0, 1, 0),
    "(N, C) no bias": (
        lambda: layers(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6)), random_image(3, 5), 0, 1, 0,
    ),
    "(N, C, L)": (
        lambda: layers(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), random_image(2, 3, 9), 0, 1, 0,
    ),
    "5-D": (
        lambda: layers(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)), random_image(1, 3, 3, 4, 5), 0, 1, 0,
    ),
    "affine=False": (
        lambda: layers(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)), IMAGE, 0, 1, 0,
    ),
    "bias=False": (
        lambda: layers(nn.Conv2d(3, 4, 1), without_bias(4)), IMAGE, 0, 1, 0,
    ),
    "momentum=None": (lambda: nn.BatchNorm2d(3, momentum=None), IMAGE, 1, 0, 0),
    "eps=0": (lambda: layers(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=0)), IMAGE, 0, 1, 0),
    "eps=1e-12": (lambda: layers(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=1e-12)), IMAGE, 0, 1, 0),
    "eps=1": (lambda: layers(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=1)), IMAGE, 0, 1, 0),
    "batch statistics": (
        lambda: layers(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **FREE)), IMAGE, 0, 0, 1,
    ),
    "batch statistics (N, C)": (
        lambda: nn.BatchNorm1d(4, affine=False, **FREE), random_image(7, 4), 0, 0, 1,
    ),
    "batch statistics 5-D": (
        lambda: nn.BatchNorm3d(3, **FREE), random_image(2, 3, 2, 3, 4), 0, 0, 1,
    ),
    "depthwise": (
        lambda: layers(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)),
        GROUPED, 0, 1, 0,
    ),
    "grouped": (
        lambda: layers(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), GROUPED, 0, 1, 0,
    ),
    "transposed": (
        lambda: layers(nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
        GROUPED, 0, 1, 0,
    ),
    "transposed grouped": (
        lambda: layers(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), GROUPED, 0, 1, 0,
    ),
    "channels-last": (
        lambda: layers(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last),
        IMAGE.contiguous(memory_format=torch.channels_last), 0, 1, 0,
    ),
    "SyncBatchNorm": (
        lambda: layers(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)), IMAGE, 0, 1, 0,
    ),
    "subclass": (lambda: layers(nn.Conv2d(3, 4, 1), Activated(4)), IMAGE, 0, 1, 0),
    "functional": (Functional, IMAGE, 0, 1, 0),
    "weight standardization": (Standardized, IMAGE, 0, 1, 0),
    "shared": (Shared, IMAGE, 2, 1, 0),
    "read twice": (ReadTwice, IMAGE, 1, 0, 0),
    "tied weights": (Tied, random_image(3, 4), 1, 0, 0),
    "returned weight": (ReturnsWeight, IMAGE, 1, 0, 0),
    "branches": (Chooses, IMAGE, 2, 0, 0),
    "float16": (
        lambda: layers(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half(), IMAGE.half(), 0, 1, 0,
    ),
    "float16 batch statistics": (
        lambda: nn.BatchNorm2d(3, **FREE).half(), IMAGE.half(), 0, 0, 1,
    ),
    "float16 convolution, float32 BatchNorm": (
        lambda: layers(nn.Conv2d(3, 4, 1).half(), nn.BatchNorm2d(4)), IMAGE.half(), 0, 1, 0,
    ),
    "float64": (lambda: nn.BatchNorm2d(3).double(), IMAGE.double(), 1, 0, 0),
}  # fmt: skip
if not takes_eps_0():
    del CASES["eps=0"]


@pytest.mark.parametrize("name", CASES)
def test_kept_and_folded_form(name):
    make, example, num_kept, num_folded, num_batch_stats = CASES[name]
    model = bnrewrite.convert(randomize(make()))
    dynamic = [{0: "batch"}]
    kept = export_onnx(model, (example,), dynamic_shapes=dynamic)
    assert kept.model is not None
    assert kept.num_batch_norm == num_kept + num_folded
    assert (kept.num_folded, kept.num_batch_stats) == (0, num_batch_stats)
    state, found = model.state_dict(), initializers(kept.model)
    for key in {key for key in state if not key.endswith("num_batches_tracked")}:
        # One name of a tensor that has several is enough.
        names = [name for name in found if name in state and state[name].is_set_to(state[key])]
        assert torch.equal(found[names[0]], state[key]), key
    assert b".py" not in kept.model.SerializeToString()
    folded = export_onnx(model, (example,), dynamic_shapes=dynamic, fold=True)
    assert folded.num_batch_norm == num_kept
    assert (folded.num_folded, folded.num_batch_stats) == (num_folded, num_batch_stats)
    assert kept.verified == folded.verified == (len(example), len(example) + 1)


def test_a_fold_that_overflows_is_not_done():
    model = randomize(layers(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half())
    model[1].running_var[0] = 0
    model[1].eps = 1e-12
    model[1].running_mean[0] = 0
    model[0].weight.data[0] = 0
    model[0].weight.data[0, 0] = 0.5
    with torch.no_grad():
        model[0].bias[0] = 0
    report = export_onnx(model, (IMAGE.half() * 1e-3,), fold=True, verify=False)
    assert (report.num_batch_norm, report.num_folded) == (1, 0)


def test_folding_is_computed_in_float64():
    """The folded float16 weight is the correctly rounded one."""
    model = randomize(layers(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half())
    report = export_onnx(model, (IMAGE.half(),), fold=True)
    assert report.model is not None
    conv, bn = model[0], model[1]
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    expected = (conv.weight.double() * scale.view(-1, 1, 1, 1)).half()
    assert torch.equal(initializers(report.model)["0.weight"], expected.detach())


@pytest.mark.parametrize(
    "opset",
    [
        pytest.param(opset, marks=[] if opset in (15, 17, 18, 23, 26) else pytest.mark.slow)
        for opset in range(15, 27)
    ],
)
def test_the_opset_asked_for_comes_out(opset):
    model = layers(randomize(Block()), nn.BatchNorm1d(5, track_running_stats=False))
    report = export_onnx(model, (IMAGE,), opset_version=opset)
    assert report.model is not None
    assert [(one.domain, one.version) for one in report.model.opset_import] == [("", opset)]
    assert report.ir_version == report.model.ir_version >= 8
    assert report.opset == opset
    assert (report.num_batch_norm, report.num_batch_stats) == (2, 1)
    assert "bn1.running_mean" in {name.partition(".")[2] for name in initializers(report.model)}


def test_bfloat16_from_opset_22_on():
    model = layers(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).bfloat16()
    for fold in (False, True):
        report = export_onnx(model, (IMAGE.bfloat16(),), opset_version=22, verify=False, fold=fold)
        assert report.inputs[0].dtype == "bfloat16"
        assert report.num_folded == fold


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("opset", [15, 18, 22])
def test_every_batch_normalization_has_one_type(opset, fold):
    """Runtimes other than onnxruntime refuse a float16 input with float32 parameters."""
    model = randomize(Mixed())
    report = export_onnx(model, (IMAGE.half(),), fold=fold, opset_version=opset)
    assert report.model is not None
    assert (report.num_batch_norm, report.num_batch_stats) == (1 if fold else 3, 1)
    graph = onnx.shape_inference.infer_shapes(report.model).graph
    types = {one.name: one.data_type for one in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    nodes = [node for node in graph.node if node.op_type == "BatchNormalization"]
    assert len(nodes) == report.num_batch_norm
    for node in nodes:
        assert {types[name] for name in (*node.input, *node.output)} == {onnx.TensorProto.FLOAT}
    found, state = initializers(report.model), model.state_dict()
    for key in ("bn2.running_mean", "bn2.running_var", *([] if fold else ["bn1.weight"])):
        assert torch.equal(found[key], state[key])


@pytest.mark.parametrize("size", [1, 2])
def test_dynamic_batch_and_space_have_the_names_given(size):
    model = randomize(layers(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
    shapes = {"input": {0: "n", 2: torch.export.Dim("height", min=4, max=64), 3: "width"}}
    report = export_onnx(model, (IMAGE[:size],), dynamic_shapes=shapes)
    assert report.inputs[0].shape == ("n", 3, "height", "width")
    assert report.outputs[0].shape == ("n", 4, "height", "width")
    assert report.verified == (size, size + 1)


class Halves(nn.Module):
    """Halves its input twice, and doubles it again, as a U-Net does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x + F.interpolate(F.max_pool2d(F.max_pool2d(x, 2), 2), scale_factor=4.0)


@pytest.mark.parametrize("batch", ["b", torch.export.Dim("b"), None], ids=["name", "Dim", "fixed"])
def test_a_derived_axis_has_the_name_given(batch):
    x = random_image(2, 3, 16, 16)
    shapes = {"x": {0: batch, 2: torch.export.Dim("h", min=2, max=8) * 4}}
    report = export_onnx(randomize(Halves()), (x,), dynamic_shapes=shapes)
    first = 2 if batch is None else "b"
    assert report.inputs[0].shape == (first, 3, "4*h", 16)
    assert report.outputs[0].shape == (first, 4, "4*h", 16)
    assert report.ranges == {"4*h": (8, 32)}
    assert report.verified == ((2,) if batch is None else (2, 3))


def test_a_size_on_which_the_model_fails_is_no_second_size():
    x = random_image(2, 3, 16, 16)
    report = export_onnx(randomize(Halves()), (x,), dynamic_shapes={"x": {2: "h"}})
    assert report.inputs[0].shape == (2, 3, "h", 16)
    assert report.verified == (2,)


def test_an_unnamed_dynamic_axis_gets_a_name():
    report = export_onnx(Block(), (IMAGE,), dynamic_shapes={"image": {0: torch.export.Dim.DYNAMIC}})
    assert report.inputs[0].shape[0] == report.outputs[0].shape[0] == "image_axis_0"


class Many(nn.Module):
    """Inputs and outputs of every form."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(
        self, x: Tensor, *rest: Tensor, scale: float = 1.0, y: Tensor | None = None, **more: Tensor
    ) -> dict[str, object]:
        assert y is not None
        return {
            "sum": self.bn(x) * scale + sum(rest) + y,
            "same": (x, None, 3, self.bn.weight),
            "more": more["z"] * 2,
        }


def test_inputs_and_outputs_are_named_after_arguments_and_keys():
    x = random_image(3, 4)
    report = export_onnx(
        Many(), (x, x + 1, x + 2), kwargs={"z": x + 3, "scale": 2.0, "y": x + 4},
        dynamic_shapes={
            "x": {0: "n"}, "rest": ({0: "n"}, {0: "n"}), "y": {0: "n"}, "more": {"z": {0: "n"}},
        },
    )  # fmt: skip
    assert [one.name for one in report.inputs] == ["x", "rest_0", "rest_1", "z", "y"]
    assert [one.name for one in report.outputs] == ["sum", "same_0", "same_3", "more"]
    assert report.verified == (3, 4)


class Frames(nn.Module):
    """Two batches through one network, taken apart again, as models of optical flow do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        both = self.bn(self.conv(torch.cat([first, second])))
        one, other = torch.chunk(both, 2)
        return one * other


@pytest.mark.parametrize("fold", [False, True])
def test_a_dynamic_axis_is_split_by_slices(fold):
    """The program ties the two batches by nothing but the name that both were given."""
    model = bnrewrite.convert(randomize(Frames()))
    report = export_onnx(model, (IMAGE, IMAGE + 1), dynamic_shapes=[{0: "n"}] * 2, fold=fold)
    assert report.model is not None
    found = operators(report.model)
    assert found["Slice"] == 2
    assert not any("Sequence" in name for name in found)
    assert report.verified == (2, 3)


class Counts(nn.Module):
    """Converts a size to an int, which fixes it when the model runs on symbolic sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) + torch.ones(int(x.shape[0]), 1, 1, 1)


def test_a_size_made_an_int_stays_dynamic():
    report = export_onnx(Counts(), (IMAGE,), dynamic_shapes=[{0: "n"}])
    assert report.inputs[0].shape == ("n", 3, 8, 9)
    assert report.verified == (2, 3)


def test_given_names_win_over_names_in_the_graph():
    report = export_onnx(Block(), (IMAGE,), input_names=["relu"], output_names=["conv2d"])
    assert [one.name for one in (*report.inputs, *report.outputs)] == ["relu", "conv2d"]


def test_external_data_lies_beside_the_model(tmp_path):
    report = export_onnx(randomize(Block(300)), (IMAGE,), tmp_path / "m.onnx", external_data=True)
    assert report.external_data == "m.onnx.data"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx").stat().st_size < (tmp_path / "m.onnx.data").stat().st_size / 10
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)


def test_weights_of_a_replaced_model_go_with_it(tmp_path):
    path, weights = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    model = randomize(Block())
    export_onnx(model, (IMAGE,), path, external_data=True)
    before = weights.read_bytes()
    with pytest.raises(bnrewrite.ExportError, match="differs from the model"):
        export_onnx(model, (IMAGE,), path, rtol=0.0, atol=0.0)
    assert weights.read_bytes() == before
    onnx.checker.check_model(str(path), full_check=True)
    export_onnx(model, (IMAGE,), path)
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("model", [None, b"no model", "an ONNX model that holds its weights"])
def test_a_file_that_the_replaced_model_does_not_name_stays(model, tmp_path):
    path, other = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    if isinstance(model, bytes):
        path.write_bytes(model)
    elif model is not None:
        export_onnx(Block(), (IMAGE,), path)
    other.write_bytes(b"precious")
    export_onnx(Block(), (IMAGE,), path)
    assert other.read_bytes() == b"precious"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real.onnx").write_bytes(b"old")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real.onnx")
    export_onnx(Block(), (IMAGE,), tmp_path / "link.onnx")
    assert (tmp_path / "link.onnx").is_symlink()
    assert (tmp_path / "real.onnx").read_bytes() != b"old"


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def check_same(model: Any, expected: ExportReport) -> None:
    report = export_onnx(model, (IMAGE,))
    assert report.model is not None
    assert expected.model is not None
    assert report.model.SerializeToString() == expected.model.SerializeToString()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is")
def test_wrappers_are_taken_off():
    model = randomize(Block())
    plain = export_onnx(model, (IMAGE,))
    check_same(nn.DataParallel(model), plain)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check_same(torch.compile(nn.parallel.DistributedDataParallel(model)), plain)
    finally:
        dist.destroy_process_group()
    check_same(torch.compile(model), plain)
    compiled_part = randomize(Block())
    compiled_part.load_state_dict(model.state_dict())
    compiled_part.conv1 = torch.compile(compiled_part.conv1)
    compiled_part.bn2.compile()
    check_same(compiled_part, plain)


def test_converted_reverted_and_plain_models_give_the_same_file():
    model = randomize(Block())
    plain = export_onnx(model.eval(), (IMAGE,))
    for mode in ("sync", "shuffle", "local", "frozen"):
        check_same(bnrewrite.convert(model, mode), plain)
    check_same(bnrewrite.revert(model), plain)


def test_a_model_that_conversion_cannot_trace_gives_the_same_file():
    class Untraceable(Block):
        def forward(self, image: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(image)

    model = randomize(Untraceable())
    plain = export_onnx(model, (IMAGE,))
    bnrewrite.convert(model)
    assert bnrewrite.report(model).skipped
    assert not bnrewrite.graphs(model)
    check_same(model, plain)


def test_hooks_run_and_counters_do_not_count():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.calls = 0
            self.seen: list[int] = []
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(self.calls)
            self.get_buffer("count").add_(1)
            return self.bn(x)

    model = Counting()
    model.bn.register_forward_hook(_double)
    report = export_onnx(model, (IMAGE,))
    assert report.model is not None
    assert operators(report.model) == {"BatchNormalization": 1, "Mul": 1}
    assert (model.calls, model.seen, model.get_buffer("count").item()) == (0, [], 0)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_with_a_flag_of_its_own_is_exported_in_eval_mode(training):
    model = randomize(Block())
    plain = export_onnx(model, (IMAGE,))
    bnrewrite.convert(model).train(training)
    model.bn1.train(not training)
    check_same(model, plain)
    assert (model.training, model.bn1.training) == (training, not training)


def test_inference_mode_changes_nothing():
    model = randomize(Block())
    plain = export_onnx(model, (IMAGE,))
    with torch.inference_mode():
        check_same(bnrewrite.convert(model), plain)
        made = randomize(Block())
        made.load_state_dict(model.state_dict())
    check_same(made, plain)


def test_a_train_method_with_side_effects_does_not_run():
    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def train(self, mode: bool = True) -> "Merging":
            if not mode:
                self.bn.weight.data.mul_(2)
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x)

    model = Merging()
    export_onnx(model, (IMAGE,))
    assert model.bn.weight.data.eq(1).all()
    assert model.bn.training


def test_functions_that_close_over_the_model_see_the_copy():
    model = randomize(Block())
    plain = export_onnx(model, (IMAGE,))
    own = model.forward
    model.forward = lambda image: own(image)
    model.bn1.forward = lambda x: type(model.bn1).forward(model.bn1, x)
    check_same(model, plain)
    assert model.training


def test_a_process_group_is_not_needed():
    model = nn.Sequential(nn.SyncBatchNorm(3))
    bnrewrite.convert(model)
    state = model[0].__dict__["_bnrewrite_site"]
    object.__setattr__(state, "sync_group", "gone")
    assert export_onnx(model, (IMAGE,)).num_batch_norm == 1
