"""The command line: what it prints, and what it says when something is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnrewrite
from bnrewrite import cli
from tests.launching import environment, run

BAD_ARGUMENTS = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["demmo"], "invalid choice: 'demmo'"),
    "unknown option": (["demo", "--epocs", "1"], "unrecognized arguments: --epocs"),
    "epochs no number": (["demo", "--epochs", "many"], "'many' is not a number of epochs"),
    "no epochs": (["demo", "--epochs", "0"], "0 is not a number of epochs from 1"),
    "no ranks": (["demo", "--world-size", "0"], "0 is not a number of ranks from 1"),
    "too many ranks": (["demo", "--world-size", "65"], "from 1 to 64"),
    "negative seed": (["demo", "--seed", "-1"], "-1 is not a seed from 0"),
    "unknown mode": (["demo", "--mode", "global"], "invalid choice: 'global'"),
    "out is a file": (["demo", "--out", "/dev/null"], "--out /dev/null: "),
    "no colon": (["report", "json"], "'json' does not have the form MODULE:FACTORY"),
    "no module": (["report", "no_such_module:x"], "cannot import no_such_module"),
    "no factory": (["report", "json:x"], "json has no 'x'"),
    "no model": (["report", "builtins:dict"], "builtins:dict() is not a torch.nn.Module, but dict"),
    "no callable": (["report", "math:pi"], "math:pi is not a function or class, but float"),
    "factory fails": (["report", "torch.nn:BatchNorm2d"], "torch.nn:BatchNorm2d called without"),
    "report mode": (
        ["report", "bnrewrite.demo.network:DigitsNet", "--mode", "global"],
        "unknown mode 'global'",
    ),
    "export without a shape": (["export", "torch.nn:Identity", "x.onnx"], "--shape"),
    "export of nothing": (
        ["export", "no_such_module:x", "x.onnx", "--shape", "1,3"],
        "cannot import no_such_module",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_argument_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert message in err
    lines = [line for line in err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1
    assert "Traceback" not in err


def test_report_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    model = "bnrewrite.demo.network:DigitsNet"
    assert cli.main(["report", model, "--html", str(page)]) == 0
    text = page.read_text()
    assert "<h1>DigitsNet</h1>" in text
    assert text.count('<li class="round') == 5
    assert text.count('<li class="round shared">') == 2
    assert "collectives forward, 7 before" in text
    for outside in ("http:", "https:", "<script", "<link", "url("):
        assert outside not in text
    assert "7 BatchNorm sites" in capsys.readouterr().out
    assert cli.main(["report", model, "--html", str(tmp_path)]) == 2
    assert "cannot be written: Is a directory" in capsys.readouterr().err
    assert cli.main(["report", model, "--html", ""]) == 2
    assert "--html  cannot be written" in capsys.readouterr().err


def test_report_counts_the_sites(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "bnrewrite.demo.network:DigitsNet"]) == 0
    assert "DigitsNet: 7 BatchNorm sites" in capsys.readouterr().out


def test_report_lists_the_sites(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "bnrewrite.demo.network:DigitsNet", "--sites"]) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("stages.0.bn2 "))
    assert "stages.0.shortcut.1" in line
    assert "demo/network.py:" in line


def test_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "bnrewrite.demo.network:DigitsNet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["sites"]) == 7
    assert report["num_communicating"] == 7
    # In both blocks the projection does not depend on the other sites.
    assert report["collectives_forward"] == 5


def test_report_of_a_model_without_batch_norm_says_what_was_looked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["report", "torch.nn:Identity"]) == 0
    out, err = capsys.readouterr()
    assert "0 BatchNorm sites" in out
    assert "nothing to convert" in err


def test_env_checks_a_converted_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert "gloo" in out
    assert "cpu input gradient" in out
    assert "FAILED" not in out


def test_env_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(check["passed"] for check in found["self_check"])
    assert found["versions"]["onnx"] != "not installed"


def test_env_fails_when_a_converted_layer_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert_badly(layer):
        layer = bnrewrite.convert(layer)
        layer.eps = 0.5
        return layer

    monkeypatch.setattr("bnrewrite.environment.convert", convert_badly)
    assert cli.main(["env"]) == 1
    assert "cpu output" in capsys.readouterr().out


def test_env_fails_when_nothing_can_be_captured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bnrewrite.capture.tracer.fx_tracing", "gone")
    assert cli.main(["env"]) == 1
    assert re.search(r"sites outside graphs +1\.0e\+00  FAILED", capsys.readouterr().out)


@pytest.mark.parametrize(("version", "remarked"), [("2.11.0+cu130", False), ("3.0", True)])
def test_env_says_which_torch_is_not_tested(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
    remarked: bool,
) -> None:
    monkeypatch.setattr("torch.__version__", version)
    assert cli.main(["env"]) == 0
    (line,) = re.findall("^torch .*", capsys.readouterr().out, re.MULTILINE)
    assert ("  not tested (tested: 2.11 to 2.15)" in line) == remarked


def test_export_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits.onnx"
    model = "bnrewrite.demo.network:DigitsNet"
    assert cli.main(["export", model, str(path), "--shape", "2,1,8,8", "--dynamic-batch"]) == 0
    assert path.stat().st_size > 0
    assert "BatchNormalization  7 kept" in capsys.readouterr().out


def test_interrupt_is_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", interrupt)
    assert cli.main(["report", "a:b"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_module_of_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.BatchNorm1d(3)\n\n\nmade = net()\n"
    )
    for name in ("net", "made"):
        done = run(["-m", "bnrewrite", "report", f"mine:{name}"], folder=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "BatchNorm1d: 1 BatchNorm site," in done.stdout
        assert done.stderr == ""


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bnrewrite", "env", "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), stdout=writing, stderr=subprocess.PIPE,
            timeout=300, check=False, text=True,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "BrokenPipeError" not in done.stderr
