"""Ranks that may be killed: processes of their own, with a store that outlives them."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

START_S = 60.0


class Worlds:
    """How a rank joins worlds: each of them has a name, members and a short time-out."""

    def __init__(self, port: int, rank: int, timeout_s: float) -> None:
        self.rank = rank
        self._port = port
        self._timeout_s = timeout_s

    def join(self, name: str, members: list[int]) -> None:
        """Forms the default group of ``members``; this rank is one of them."""
        store = dist.TCPStore(
            "127.0.0.1",
            self._port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=START_S),
        )
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(name, store),
            rank=members.index(self.rank),
            world_size=len(members),
            timeout=timedelta(seconds=self._timeout_s),
        )


def run(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout_s: float,
    victims: tuple[int, ...] = (),
    limit_s: float = 100.0,
) -> list[Any]:
    """Results of ``function(worlds, *args)`` on every rank; None for ``victims``, who may die.

    Every process is gone when it returns, stopped ones too.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "bnrewrite"])
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    try:
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            worlds = Worlds(server.port, rank, timeout_s)
            process = context.Process(target=_serve, args=(theirs, worlds, function, args))
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(pipes, victims, time.monotonic() + limit_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _collect(pipes: list[Connection], victims: tuple[int, ...], deadline: float) -> list[Any]:
    results: dict[int, Any] = dict.fromkeys(victims)
    while len(results) < len(pipes):
        waiting = {pipes[rank]: rank for rank in range(len(pipes)) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"rank(s) {sorted(waiting.values())} did not finish"
        for pipe in ready:
            rank = waiting[pipe]  # pyright: ignore[reportArgumentType]
            try:
                passed, result = pickle.loads(pipe.recv_bytes())  # pyright: ignore
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert passed, f"--- rank {rank} failed\n{result}"
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _serve(pipe: Connection, worlds: Worlds, function: Callable[..., Any], args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        result = (True, function(worlds, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    # Pickled here: the pipe's own pickler would share the memory of tensors, which ends with us.
    pipe.send_bytes(pickle.dumps(result))
