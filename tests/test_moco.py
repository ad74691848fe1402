"""The example of momentum contrast, run as its docstring says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_example_trains_with_the_statistics_of_the_next_rank() -> None:
    command = [sys.executable, "examples/moco.py", "--ranks", "3", "--epochs", "1", "--shuffle"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    means = re.findall(r"rank (\d): .* own keys (\[.*?\]), normalized with (\[.*?\])", done.stdout)
    assert len(means) == 3
    for rank, _, used in means:
        assert used == means[(int(rank) + 1) % 3][1]
    assert re.search(r"epoch +1: loss [\d.]+, contrastive [\d.]+%, nearest neighbor", done.stdout)
