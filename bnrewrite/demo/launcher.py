"""The launcher: starts the ranks on this machine with torch's own elastic launcher."""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bnrewrite.demo.runs import Settings

_SIGNALS = ("SIGTERM", "SIGHUP", "SIGQUIT")


class RankFailedError(RuntimeError):
    """A rank ended with an error, which it has printed itself."""


def launch(settings: Settings) -> dict[str, Any]:
    """Runs the worker on ``world_size`` local ranks and returns what the first one saved.

    The ranks meet at a free port of 127.0.0.1. However this ends, no rank is left behind.

    Raises:
        RankFailedError: a rank failed.
        SystemExit: the launcher was told to terminate.
    """
    with tempfile.TemporaryDirectory(prefix="bnrewrite-demo-") as folder:
        path = os.path.join(folder, "outcomes.pt")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=settings.world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            # The launcher would pass SIGINT on, and each rank would print where it was; left to
            # Python, an interrupt ends the launcher, which then terminates the ranks.
            signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
        )
        arguments = ["-m", "bnrewrite.demo.worker", json.dumps(dataclasses.asdict(settings)), path]
        with _quiet_launcher(), _environment(_rank_environment()), _signals_restored():
            try:
                elastic_launch(config, sys.executable)(*arguments)
            except SignalException as stopped:
                raise SystemExit(128 + stopped.sigval) from stopped
            except ChildFailedError as failed:
                first, failure = failed.get_first_failure()
                raise RankFailedError(
                    f"rank {first} exited with code {failure.exitcode}; its own message is above."
                ) from failed
        return torch.load(path, map_location="cpu", weights_only=False)


def _rank_environment() -> dict[str, str]:
    """Settings that the ranks inherit, where the user has not chosen otherwise."""
    wanted = {
        # Ranks share the cores, and tensors this small gain nothing from threads.
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        # Otherwise gloo looks up the name of the machine, which need not resolve.
        wanted["GLOO_SOCKET_IFNAME"] = loopback[0]
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """The launcher installs handlers and leaves them; this puts the previous ones back."""
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Silences the launcher's own log: failures reach the user as one line."""
    log = logging.getLogger("torch.distributed.elastic")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
