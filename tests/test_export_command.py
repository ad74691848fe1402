"""The command ``export``: what it prints, what it writes, and how it fails."""

import argparse

import onnx
import pytest
import torch

from bnrewrite.export.command import add_arguments, run
from tests.export_models import Block, randomize


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


def test_it_writes_the_model_and_prints_stages_and_report(tmp_path, capsys):
    path = tmp_path / "m.onnx"
    words = ["--shape", "2,3,8,9", "--dynamic-batch", "--fold", "--opset", "20"]
    assert call("tests.export_models:Block", str(path), *words) == 0
    written = onnx.load(path)
    assert written.opset_import[0].version == 20
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    out, err = capsys.readouterr()
    assert "0 kept, 2 folded" in out
    assert "verified            against the model" in out
    stages = ["running the model", "tracing", "converting", "writing", "comparing"]
    lines = err.splitlines()
    assert len(lines) == len(stages)
    assert all(line.startswith(stage) for line, stage in zip(lines, stages, strict=True))


def test_it_loads_weights(tmp_path):
    state = randomize(Block()).state_dict()
    torch.save(state, tmp_path / "w.pt")
    words = ["--shape", "1x3x8x9", "--weights", str(tmp_path / "w.pt")]
    assert call("tests.export_models:Block", str(tmp_path / "m.onnx"), *words) == 0
    found = {
        one.name: onnx.numpy_helper.to_array(one)
        for one in onnx.load(tmp_path / "m.onnx").graph.initializer
    }
    assert (found["bn1.running_var"] == state["bn1.running_var"].numpy()).all()


def test_half_precision_inputs(tmp_path):
    words = ["--shape", "1,3,8,9", "--dtype", "float16", "--no-verify"]
    assert call("tests.export_models:Block", str(tmp_path / "m.onnx"), *words) == 0
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        ("tests.export_models", "1,3,8,9", "not of the form MODULE:FACTORY"),
        ("no_such_module:Block", "1,3,8,9", "'no_such_module:Block' cannot be found"),
        ("tests.export_models:Blocks", "1,3,8,9", "cannot be found"),
        ("tests.export_models:operators", "1,3,8,9", "cannot be called without arguments"),
        ("builtins:dict", "1,3,8,9", "gives dict, not a torch.nn.Module"),
        ("tests.export_models:Block", "1,3,a", "'1,3,a' is not a list of sizes"),
        ("tests.export_models:Block", "1,4,8,9", "fails in eval mode"),
    ],
)
def test_errors_are_one_message_and_status_one(model, shape, message, tmp_path, capsys):
    assert call(model, str(tmp_path / "m.onnx"), "--shape", shape) == 1
    err = capsys.readouterr().err
    assert "error: " in err
    assert message in err
    assert not list(tmp_path.iterdir())
