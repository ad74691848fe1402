"""The kept form: names, values, node count, versions, and agreement with the user's model."""

import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch

import bnrewrite
from bnrewrite import export_onnx
from tests.export_models import Block, initializers, operators, random_image, randomize


@pytest.fixture
def image() -> torch.Tensor:
    return random_image()


@pytest.mark.parametrize("mode", [None, "sync", "local", "frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_kept_form_has_the_parameters_under_their_names_and_one_node_per_layer(
    image, mode, training, tmp_path
):
    model = randomize(Block()).train(training)
    if mode is not None:
        bnrewrite.convert(model, mode)
    report = export_onnx(
        model, (image,), tmp_path / "m.onnx", dynamic_shapes={"image": {0: "batch"}}
    )
    written = onnx.load(tmp_path / "m.onnx")
    assert operators(written) == {
        "Conv": 2, "BatchNormalization": 2, "Relu": 2, "Add": 1, "ReduceMean": 1, "Gemm": 1,
    }  # fmt: skip
    state = model.state_dict()
    found = initializers(written)
    used = {name for name in state if not name.endswith("num_batches_tracked")}
    assert used <= found.keys()
    for name in used:
        assert torch.equal(found[name], state[name]), name
    assert all(found[name].dtype == torch.int64 for name in found.keys() - used)
    assert (report.opset, report.ir_version) == (18, 8)
    assert (written.opset_import[0].version, written.ir_version) == (18, 8)
    assert report.num_batch_norm == 2
    assert report.verified == (2, 3)
    assert report.max_rel is not None
    assert report.max_rel < 1e-5
    assert [str(one) for one in report.inputs] == ["image: float[batch, 3, 8, 9]"]
    assert [str(one) for one in report.outputs] == ["output: float[batch, 5]"]


def test_the_file_computes_what_the_model_computes_in_eval_mode(image, tmp_path):
    model = bnrewrite.convert(randomize(Block()))
    export_onnx(model, (image,), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {"image": image.numpy()})
    expected = model.eval()(image)
    # float32 through a dozen operations: 1e-6 of the scale, with a margin of ten.
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(got), expected.detach(), rtol=0, atol=1e-5 * scale)


def test_the_model_is_left_untouched(image, tmp_path):
    model = bnrewrite.convert(randomize(Block()))
    model.bn1.eval()
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    state = torch.get_rng_state()
    export_onnx(model, (image,), tmp_path / "m.onnx")
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for module, cls, attributes in objects:
        assert type(module) is cls
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[name] is attributes[name] for name in attributes)
    assert model.training
    assert not model.bn1.training
    assert bnrewrite.graphs(model)


def test_no_local_path_and_no_metadata_reaches_the_file(image, tmp_path):
    export_onnx(Block(), (image,), tmp_path / "m.onnx")
    written = onnx.load(tmp_path / "m.onnx")
    assert not written.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in written.graph.node)
    assert b".py" not in written.SerializeToString()


def test_without_a_path_the_report_holds_the_model(image):
    report = export_onnx(Block(), image)
    assert report.path is None
    assert report.model is not None
    onnx.checker.check_model(report.model, full_check=True)
    assert "model" not in report.to_dict()
    assert "BatchNormalization  2 kept" in str(report)


class Pathways(torch.nn.Module):
    """Takes tensors in a list and a dictionary, as networks of two pathways do."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = (
            torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)) for _ in range(2)
        )

    def forward(self, x, *more, scale=1.0):
        y = self.fast(x[0]) + self.slow(x[1]["slow"]) * x[1]["weight"]
        return (y * scale, *(y + one[0] for one in more))


BATCH = {0: "batch"}


@pytest.mark.parametrize(
    "axes",
    [
        {"x": [BATCH, {"slow": BATCH, "weight": None}], "more": [[BATCH]]},
        {"x_0": BATCH, "x_1_slow": BATCH, "more_0_0": BATCH},
        [BATCH, BATCH, BATCH],
    ],
)
@pytest.mark.parametrize("fold", [False, True])
def test_tensors_in_lists_and_dictionaries_are_inputs(axes, fold):
    model = bnrewrite.convert(randomize(Pathways()))
    x = [random_image(), {"slow": random_image(), "weight": 2}]
    more = (torch.rand(2, 4, 6, 7),)
    report = export_onnx(model, (x, more), dynamic_shapes=axes, fold=fold)
    assert [one.name for one in report.inputs] == ["x_0", "x_1_slow", "more_0_0"]
    assert [one.shape[0] for one in report.inputs] == ["batch"] * 3
    assert report.verified == (2, 3)
    assert report.max_rel is not None
    assert report.max_rel < 1e-5
    assert isinstance(x[1], dict)
    assert list(x[1]) == ["slow", "weight"]


@pytest.mark.parametrize("more", [None, [], ()])
def test_axes_of_arguments_that_are_not_given(more):
    x = [random_image(), {"slow": random_image(), "weight": 2}]
    axes = {"x": [BATCH, {"slow": BATCH}], "more": more}
    report = export_onnx(randomize(Pathways()), (x,), dynamic_shapes=axes)
    assert report.verified == (2, 3)


def test_names_of_inputs_inside_others_are_distinct():
    class Named(torch.nn.Module):
        def forward(self, x, x_0):
            return x[0] + x_0

    report = export_onnx(Named(), ([torch.rand(2)], torch.rand(2)))
    assert [one.name for one in report.inputs] == ["x_0", "x_0_1"]


def test_a_failed_export_leaves_the_file_as_it_was_and_nothing_else(image, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"precious")
    with pytest.raises(bnrewrite.ExportError, match="differs from the model"):
        export_onnx(Block(), (image,), path, rtol=0.0, atol=0.0)
    assert path.read_bytes() == b"precious"
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]


def test_importing_the_package_imports_no_onnx():
    code = "import sys, bnrewrite; print([n for n in sys.modules if n.startswith('onnx')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
