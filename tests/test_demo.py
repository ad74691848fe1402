"""The demo, from the launcher's processes to its files, and the parts that it is made of."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bnrewrite.demo import text
from bnrewrite.demo.data import NUM_TEST, epoch_batches, load_digits
from bnrewrite.demo.network import DigitsNet
from bnrewrite.demo.runs import MODES, Settings, equal_run, planned_runs
from bnrewrite.demo.training import Plan, evaluate
from tests.launching import environment, run

# Rounding of float64 (1e-16), amplified by some hundred steps of training: measured 3e-13.
ROUNDING = 1e-10


def test_demo_compares_trains_draws_and_exports(tmp_path: Path) -> None:
    done = run(["-m", "bnrewrite", "demo", "--epochs", "1"], folder=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    # Builds of torch for CUDA say so where there is a toolkit and no GPU.
    said = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert said == [], "the demo is free of warnings and logs"
    folder = tmp_path / "demo-out"
    assert sorted(os.listdir(folder)) == ["curves.png", "digits.onnx", "results.json"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert sorted(results) == ["compiled", "converted", "local", "single"]
    losses = {key: torch.tensor(value["batch_losses"]) for key, value in results.items()}
    assert len(losses["single"]) == 600
    for key in ("converted", "compiled"):
        torch.testing.assert_close(losses[key], losses["single"], rtol=0, atol=ROUNDING)
    # The statistics of one image are no substitute: several times the loss on unseen images.
    final = {key: value["test"][-1]["loss"] for key, value in results.items()}
    assert final["local"] > 2 * final["converted"]
    assert "DigitsNet: 7 BatchNorm sites" in done.stdout
    assert "world size 2" in done.stdout
    assert f"same digit for {NUM_TEST} of {NUM_TEST}" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if tmp_path.name not in line) <= 100


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the ranks in /proc")
def test_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bnrewrite", "demo", "--out", str(tmp_path)],
        cwd=tmp_path,
        env={**environment(), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ranks = _wait_for_ranks(process.pid)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.strip() == "bnrewrite demo: interrupted"
    assert len(ranks) == 2
    assert not any(_alive(rank) for rank in ranks)
    assert not list(tmp_path.glob("bnrewrite-demo-*"))


def _wait_for_ranks(parent: int) -> list[int]:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        ranks = [pid for pid in _processes() if _is_rank(pid, parent)]
        if len(ranks) == 2:
            # Far enough that they train and know each other.
            time.sleep(8)
            return ranks
        time.sleep(0.2)
    raise AssertionError("the demo did not start two ranks")


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_rank(pid: int, parent: int) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return (
        "bnrewrite.demo.worker" in arguments and int(stat.rpartition(")")[2].split()[1]) == parent
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_a_run_of_plain_torch_to_agree_with(mode: str) -> None:
    runs = {run.key: run for run in planned_runs(Settings(mode=mode))}
    assert list(runs) == ["single", "local", "converted", "compiled"]
    assert runs[equal_run(mode)].mode is None
    assert {key for key, run in runs.items() if run.mode == mode} == {"converted", "compiled"}
    assert max(len(run.title) for run in runs.values()) <= text.TITLE_WIDTH


def test_ranks_share_each_batch_and_see_every_image_once() -> None:
    whole = epoch_batches(101, 6, seed=3, epoch=2)
    assert whole.shape == (16, 6)
    assert whole.unique().numel() == whole.numel()
    plans = [Plan(epochs=1, batch_size=6, seed=3, rank=rank, world_size=3) for rank in range(3)]
    parts = [plan.batches(101, epoch=2) for plan in plans]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert not torch.equal(whole, epoch_batches(101, 6, seed=3, epoch=1))


def test_split_is_the_same_for_the_same_seed_only() -> None:
    train, test = load_digits(0)
    assert (len(train.labels), len(test.labels)) == (1797 - NUM_TEST, NUM_TEST)
    assert torch.equal(train.images, load_digits(0)[0].images)
    assert not torch.equal(train.images, load_digits(1)[0].images)
    assert 0 <= train.images.min() <= train.images.max() <= 1


def test_evaluation_puts_every_layer_back_into_its_mode() -> None:
    network = DigitsNet().double()
    network.bn.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    score = evaluate(network, load_digits(0)[1])
    assert 0 <= score.accuracy <= 1
    assert network.training
    assert not network.bn.training
    assert network.stages.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_demo_says_which_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bnrewrite import cli
    from bnrewrite.demo import command

    monkeypatch.setattr(command, "_NEEDED", {"no_such_package": "no-such-package"})
    assert cli.main(["demo"]) == 1
    assert "pip install no-such-package" in capsys.readouterr().err


def test_rank_that_fails_is_one_line_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bnrewrite.demo import launcher

    # It is too large to split the digits by, so that no run comes before.
    broken = Settings(seed=1 << 64)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(launcher.RankFailedError, match=r"rank \d exited with code 1"):
        launcher.launch(broken)
    assert signal.getsignal(signal.SIGTERM) is before
