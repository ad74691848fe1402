"""The README keeps its word: its Python runs, its output is what runs print, its names exist."""

import re
import shlex
from pathlib import Path

import pytest

from bnrewrite import cli
from bnrewrite.torch_versions import NEWEST, OLDEST, is_tested
from tests.launching import ROOT, run, torchrun

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:<!-- (.*?) -->\n)?```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [(marker, code) for marker, language, code in BLOCKS if language == "python"]


def _text(marker: str) -> str:
    (found,) = [code for name, _, code in BLOCKS if name == marker]
    return found


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_every_block_names_its_language() -> None:
    assert 2 * len(BLOCKS) == README.count("```")
    assert {language for _, language, _ in BLOCKS} == {"python", "bash", "text"}
    assert len(PYTHON) >= 4


@pytest.mark.parametrize(("marker", "code"), PYTHON, ids=[code[:40] for _, code in PYTHON])
def test_python_runs(marker: str, code: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(code)
    if marker == "torchrun":
        done = torchrun(["script.py"], folder=tmp_path, timeout=180)
        assert done.returncode == 0, done.stderr
        assert _lines(_text("report of two ranks")) == _lines(done.stdout)
    else:
        # Marked for nothing else, so that no block is skipped by a misspelt marker.
        assert marker == ""
        done = run(["-W", "error", "script.py"], folder=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr


def test_one_block_runs_on_two_ranks() -> None:
    assert [marker for marker, _ in PYTHON].count("torchrun") == 1


@pytest.mark.parametrize("line", [line for line in BLOCKS if "-m bnrewrite" in line[2]])
def test_commands_are_understood(line: tuple[str, str, str]) -> None:
    """Each command parses; ``test_cli`` and ``test_demo`` run what they do."""
    parser, _ = cli.make_parser()
    commands = re.findall(r"python -m bnrewrite ([^#\n]+)", line[2])
    assert commands
    for command in commands:
        parser.parse_args(shlex.split(command))


def test_set_up_names_the_torch_that_is_tested() -> None:
    for marker, extra in (("demo command", "demo"), ("test command", "test")):
        command = _text(marker)
        assert f'pip install torch==2.13.0 -e ".[{extra}]"' in command
        assert len(command.splitlines()) == 1
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    assert f"torch {oldest} to {newest}" in README
    assert f'"torch>={oldest}"' in (ROOT / "pyproject.toml").read_text()
    assert is_tested()


def test_files_that_it_names_exist() -> None:
    for name in re.findall(r"`((?:examples|bnrewrite|\.ci)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name
