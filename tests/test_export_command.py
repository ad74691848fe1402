"""The command ``export``: what it prints, what it writes, and how it fails."""

import os
import signal
import threading
import time

import onnx
import pytest
import torch

from bnrewrite import cli
from bnrewrite.export import verify
from tests.export_models import Block, randomize


def call(*words: str) -> int:
    return cli.main(["export", *words])


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
    ("model", "shape", "code", "message"),
    [
        ("tests.export_models", "1,3,8,9", 2, "not have the form MODULE:FACTORY"),
        ("no_such_module:Block", "1,3,8,9", 2, "cannot import no_such_module"),
        ("tests.export_models:Blocks", "1,3,8,9", 2, "tests.export_models has no 'Blocks'"),
        (
            "tests.export_models:operators",
            "1,3,8,9",
            2,
            "tests.export_models:operators called without",
        ),
        ("builtins:dict", "1,3,8,9", 2, "is not a torch.nn.Module, but dict"),
        ("tests.export_models:Block", "1,3,a", 2, "'1,3,a' is not a list of sizes"),
        ("tests.export_models:Block", "0,3,8,9", 2, "'0,3,8,9' has a size below 1"),
        ("tests.export_models:Block", "1,-3,8,9", 2, "'1,-3,8,9' has a size below 1"),
        ("tests.export_models:Block", f"{2**40},{2**22}", 2, "does not fit into memory"),
        ("tests.export_models:Block", f"1,{2**80}", 2, "does not fit into memory"),
        ("tests.export_models:Block", "1,4,8,9", 1, "fails in eval mode"),
    ],
)
def test_errors_are_one_line_and_a_status(model, shape, code, message, tmp_path, capsys):
    assert cli.main(["export", model, str(tmp_path / "m.onnx"), "--shape", shape]) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("bnrewrite export: error: ")
    assert message in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "opset", "message"),
    [
        ("m.onnx", "3", "opset_version 3 is not supported"),
        ("missing/m.onnx", "18", "the directory of path does not exist"),
        ("", "18", "path is a directory"),
    ],
)
def test_what_cannot_be_written_is_an_error_before_the_model_is_made(
    file, opset, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("bnrewrite.export.command.load_model", None)
    words = ["--shape", "1,3,8,9", "--opset", opset]
    assert call("tests.export_models:Block", str(tmp_path / file), *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bnrewrite export: error: ")
    assert message in line


WEIGHTS = {
    "missing": (None, "No such file"),
    "junk": (b"junk", "not a file that torch.load"),
    "whole model": (Block(), "not a file that torch.load"),
    "list": ([1], "does not hold a state dict, but list"),
    "checkpoint": ({"model": Block().state_dict(), "epoch": 3}, "no tensors, but model, epoch"),
    "other model": (Block(9).state_dict(), "size mismatch for conv1.weight"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit_are_one_line_and_a_status(name, tmp_path, capsys):
    content, message = WEIGHTS[name]
    file = tmp_path / "w.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    words = ["--shape", "1,3,8,9", "--weights", str(file)]
    assert call("tests.export_models:Block", str(tmp_path / "m.onnx"), *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bnrewrite export: error: --weights {file}")
    assert message in line


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_ends_it_with_nothing_left_behind(number, status, tmp_path, capsys, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"precious")

    def stop(_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        os.kill(os.getpid(), number)
        # The handler runs at one of the next byte codes.
        time.sleep(1)

    monkeypatch.setattr(verify, "check", stop)
    before = signal.getsignal(number)
    try:
        code = call("tests.export_models:Block", str(path), "--shape", "1,3,8,9")
    except SystemExit as stopped:
        code = stopped.code
    assert code == status
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"precious"
    assert signal.getsignal(number) is before


def test_it_works_in_a_thread_which_may_set_no_handlers(tmp_path):
    words = ["tests.export_models:Block", str(tmp_path / "m.onnx"), "--shape", "1,3,8,9"]
    codes = []
    thread = threading.Thread(target=lambda: codes.append(call(*words, "--no-verify")))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupt_that_an_import_swallows_still_is_one(stopped, tmp_path, monkeypatch):
    def load(_: object) -> None:
        raise ImportError("initialization failed") from stopped

    monkeypatch.setattr(verify, "Runtime", load)
    words = ["tests.export_models:Block", str(tmp_path / "m.onnx"), "--shape", "1,3,8,9"]
    if isinstance(stopped, KeyboardInterrupt):
        assert call(*words) == 130
    else:
        with pytest.raises(SystemExit):
            call(*words)
