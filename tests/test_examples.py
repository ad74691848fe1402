"""The examples do what they say: train on two ranks, go on from a checkpoint, export."""

import re
from pathlib import Path

import torch

from tests.launching import ROOT, run, torchrun

TRAIN = str(ROOT / "examples" / "train_ddp.py")
EXPORT = str(ROOT / "examples" / "export_onnx.py")


def _train(folder: Path, checkpoint: str, *options: str) -> str:
    fast = ("--batch-size", "20", "--lr", "0.05")
    done = torchrun([TRAIN, "--checkpoint", checkpoint, *fast, *options], folder=folder)
    assert done.returncode == 0, done.stderr
    assert "DigitsNet: 7 BatchNorm sites" in done.stdout
    assert "world size 2" in done.stdout
    return done.stdout


def _accuracy(output: str) -> float:
    return float(re.findall(r"test accuracy ([0-9.]+)%", output)[-1])


def _load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    whole = _train(tmp_path, "whole.pt", "--epochs", "2")
    _train(tmp_path, "parts.pt", "--epochs", "1")
    rest = _train(tmp_path, "parts.pt", "--epochs", "2", "--resume")
    assert "epoch 1:" not in rest
    assert whole.splitlines()[-1] == rest.splitlines()[-1]
    one, two = _load(tmp_path / "whole.pt"), _load(tmp_path / "parts.pt")
    assert one["epoch"] == two["epoch"] == 2
    assert one["schedule"] == two["schedule"]
    for name, value in one["network"].items():
        # Two ranks add two numbers, in either order the same bits.
        assert torch.equal(value, two["network"][name]), name
    momenta = [state["optimizer"]["state"] for state in (one, two)]
    for index, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][index]["momentum_buffer"])
    assert _accuracy(whole) > 70

    done = run([EXPORT, "whole.pt", "digits.onnx"], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    right, total = map(int, re.findall(r"onnxruntime: (\d+) of (\d+)", done.stdout)[0])
    assert abs(100 * right / total - _accuracy(whole)) < 0.2, "rounding may change one image"


def test_training_under_autocast_and_compiled_learns(tmp_path: Path) -> None:
    options = ("--epochs", "2", "--amp", "--compile")
    assert _accuracy(_train(tmp_path, "checkpoint.pt", *options)) > 70
