"""Subprocesses for the tests of what users start: command line, examples, README."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """The environment of this process, with this checkout first and one thread per process."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    found = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if loopback is not None:
        found["GLOO_SOCKET_IFNAME"] = loopback
    # The workers of pytest-xdist set this for themselves.
    found.pop("PYTEST_XDIST_WORKER", None)
    return found


def run(
    arguments: list[str], *, folder: Path, timeout: float = 540
) -> subprocess.CompletedProcess[str]:
    """Runs ``python`` with ``arguments`` in ``folder`` and waits for it."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def torchrun(
    arguments: list[str], *, folder: Path, num_ranks: int = 2, timeout: float = 540
) -> subprocess.CompletedProcess[str]:
    """Runs a script on local ranks that meet at a free port."""
    launcher = [
        *("-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(num_ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *("--local-addr", "127.0.0.1"),
    ]
    done = run([*launcher, *arguments], folder=folder, timeout=timeout)
    if done.returncode and "connectFullMesh" in done.stderr:
        # On a busy machine gloo sometimes fails to form a world, before anything of ours runs.
        done = run([*launcher, *arguments], folder=folder, timeout=timeout)
    return done
