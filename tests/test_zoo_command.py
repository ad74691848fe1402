"""The command ``python -m tests.zoo``: what it stores, and how it goes on from there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.zoo import __main__ as command
from tests.zoo import export, export_table
from tests.zoo.spec import Call, Spec


def batch(model: nn.Module, n: int) -> Call:
    return (torch.rand(n, 3, 8, 8),), {}


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def large() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU())


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were built since, of a collection with two families."""
    names: list[str] = []

    def spec(name: str, make: Callable[[], nn.Module], family: str) -> Spec:
        def noted() -> nn.Module:
            names.append(name)
            return make()

        return Spec("timm", name, noted, batch, family=family)

    found = {
        "a_small": spec("a_small", small, "a"),
        "a_large": spec("a_large", large, "a"),
        "b": spec("b", large, "b"),
    }
    monkeypatch.setattr(command, "specs_of", lambda suite: found if suite == "timm" else {})
    return names


def call(path: Path, *words: str) -> list[str]:
    """Names of the stored rows, in their order."""
    assert command.main(["--json", str(path), *words]) == 0
    stored = json.loads(path.read_text("utf-8"))
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert stored["summary"]["all"]["models"] == len(stored["rows"])
    return [row["name"] for row in stored["rows"]]


def test_a_resumed_sweep_keeps_the_rows_and_runs_the_rest(built, tmp_path):
    path = tmp_path / "rows.json"
    assert call(path, "--name", "a_small", "--export") == ["a_small"]
    before = json.loads(path.read_text("utf-8"))
    built.clear()
    assert call(path, "--resume", "--export") == ["a_small", "a_large", "b"]
    assert "a_small" not in built
    after = json.loads(path.read_text("utf-8"))
    assert after["rows"][0] == before["rows"][0]
    assert after["earlier conditions"] == [before["conditions"]]
    assert after["summary"]["all"]["exports without an error"] == 3
    assert call(path, "--name", "b") == ["b"]


def test_a_resumed_sweep_of_families_leaves_out_those_with_a_row(built, tmp_path):
    path = tmp_path / "rows.json"
    assert call(path, "--name", "a_large") == ["a_large"]
    built.clear()
    assert call(path, "--resume", "--one-per-family") == ["a_large", "b"]
    assert set(built) == {"b"}


def test_a_finished_sweep_leaves_no_model_of_which_it_says_that_it_was_not_begun(
    built, tmp_path, monkeypatch
):
    path = tmp_path / "rows.json"
    plain = Spec("timm", "plain", lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), batch)
    more = {**command.specs_of("timm"), "plain": plain}
    monkeypatch.setattr(command, "specs_of", lambda suite: more if suite == "timm" else {})
    stored: list[dict] = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        stored.append(json.loads(self.read_text("utf-8")))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    assert call(path) == ["a_small", "a_large", "b"]
    rest = ["timm/a_large", "timm/b", "timm/plain"]
    assert [one["not begun"] for one in stored] == [rest, rest[1:], rest[2:], []]


def test_resuming_needs_the_file(capsys):
    with pytest.raises(SystemExit):
        command.main(["--resume"])
    assert "--resume needs --json FILE" in capsys.readouterr().err


def test_the_table_of_exports_has_a_line_for_each_model_and_the_reasons(
    built, tmp_path, monkeypatch
):
    path = tmp_path / "rows.json"
    assert call(path, "--name", "a_*", "--export") == ["a_small", "a_large"]
    monkeypatch.setattr(export, "mild_statistics", lambda model: object())
    command.main(["--json", str(path), "--resume", "--export"])
    export_table.main([str(path)])
    text = path.with_suffix(".md").read_text("utf-8")
    assert "3 models: 2 exported in both forms, 2 BatchNormalization nodes kept, 2 of" in text
    assert "\n| timm/a_small | 1 | 1 | 0 | " in text
    assert "\n| timm/b | none |" in text
    assert "\n- timm/b: " in text


def test_the_stored_table_is_that_of_the_stored_rows():
    path = Path(__file__).parents[1] / "benchmarks/results/zoo_export.json"
    table = export_table.table(json.loads(path.read_text("utf-8")))
    assert path.with_suffix(".md").read_text("utf-8") == table
