"""Ranks for tests: processes that stay alive between tests and form worlds of any size.

Importing torch takes seconds, so the processes are started once per test session. Each run forms a
fresh gloo world through a file, so that parallel sessions never compete for a port, and ends it.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TIMEOUT_S = 90.0

SUMS = ("all_reduce", "all_gather_into_tensor")
"""Collectives of which one sums statistics over the ranks."""


class CountCollectives(TorchDispatchMode):
    """Notes every collective, functional or not, that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        if func.namespace in ("_c10d_functional", "c10d") and name != "wait_tensor":
            tensor = next(arg for arg in tree_leaves(args) if isinstance(arg, Tensor))
            self.seen.append((name, tensor.dtype, tensor.numel()))
        return func(*args, **(kwargs or {}))


class RankPool:
    """Processes that run a function as the ranks of a world.

    A rank that raises fails the run with the traceback of that rank; a run that takes too long
    fails with the stack of every rank that was still busy, and the processes are replaced.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "bnrewrite"])
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self._workers: list[tuple[Any, Connection, Path]] = []
        self._num_runs = 0

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = TIMEOUT_S,
    ) -> list[Any]:
        """Results of ``function(rank, world_size, *args)`` on every rank, in order."""
        while len(self._workers) < world_size:
            self._start()
        self._num_runs += 1
        store = f"file://{self._folder.name}/store{self._num_runs}"
        for rank in range(world_size):
            job = (function, rank, world_size, store, args)
            self._workers[rank][1].send_bytes(pickle.dumps(job))
        results: dict[int, tuple[float, bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) < world_size:
            waiting = {self._workers[r][1]: r for r in range(world_size) if r not in results}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail_hung(sorted(waiting.values()), results, timeout_s)
            for connection in ready:
                rank = waiting[connection]  # pyright: ignore[reportArgumentType]
                try:
                    results[rank] = pickle.loads(connection.recv_bytes())  # pyright: ignore
                except EOFError:
                    results[rank] = (time.time(), False, "the process died")
        self._raise_failures(results)
        return [results[rank][2] for rank in range(world_size)]

    def close(self) -> None:
        """Ends the processes for good."""
        self._end_workers()
        self._folder.cleanup()

    def _end_workers(self) -> None:
        for process, connection, _ in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        stacks = Path(self._folder.name) / f"stacks{len(self._workers)}-{time.monotonic_ns()}"
        process = self._context.Process(
            target=_serve, args=(theirs, str(stacks), sys.path), daemon=True
        )
        process.start()
        theirs.close()
        self._workers.append((process, ours, stacks))

    def _fail_hung(self, hung: list[int], results: dict, timeout_s: float) -> None:
        lines = [f"rank(s) {hung} did not finish within {timeout_s} s"]
        for rank in hung:
            process, _, stacks = self._workers[rank]
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.5)
            lines.append(f"--- rank {rank} hangs at\n{stacks.read_text()}")
        lines += _failures(results)
        self._end_workers()
        raise AssertionError("\n".join(lines))

    def _raise_failures(self, results: dict[int, tuple[float, bool, Any]]) -> None:
        failures = _failures(results)
        if failures:
            # A world that broke may leave connections behind.
            self._end_workers()
            raise AssertionError("\n".join(failures))


def _failures(results: dict[int, tuple[float, bool, Any]]) -> list[str]:
    """Tracebacks of the ranks that failed, the first to fail first."""
    failed = sorted((at, rank, what) for rank, (at, passed, what) in results.items() if not passed)
    return [f"--- rank {rank} failed\n{what}" for _, rank, what in failed]


def _serve(connection: Connection, stacks: str, path: list[str]) -> None:
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        while True:
            try:
                job = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(pickle.dumps(_run(job)))


def _run(job: bytes) -> tuple[float, bool, Any]:
    # When this rank failed, and not when its peers let go of it afterwards.
    failed_at = None
    try:
        function, rank, world_size, store, args = pickle.loads(job)
        torch.manual_seed(0)
        fill_with_nan()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Compilers use what torch itself has deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            dist.init_process_group(
                "gloo",
                init_method=store,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=60),
            )
            _wait_for_all(rank, world_size)
            try:
                result = function(rank, world_size, *args)
                pickle.dumps(result)
            except BaseException:
                failed_at = time.time()
                raise
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        return time.time(), True, result
    except BaseException:
        return failed_at or time.time(), False, traceback.format_exc()
    finally:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()


def _wait_for_all(rank: int, world_size: int) -> None:
    """Waits until all ranks are connected: gloo fails if one of them ends its group before."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"connected{rank}", "")
    store.wait([f"connected{other}" for other in range(world_size)])


def fill_with_nan() -> None:
    """Makes torch fill memory that it does not initialize with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
