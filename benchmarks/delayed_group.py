"""A gloo process group whose all-reduces take longer, so that one machine shows what latency does.

    dist.Backend.register_backend("delayed", delayed_gloo, devices=["cpu"])
    dist.init_process_group("delayed", ...)

Launching costs nothing: whoever waits, waits until the delay since the launch is over. That is how
a network behaves whose latency is larger than its use of the processor.
"""

import time
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, BroadcastOptions

TIMELINE: list[tuple[str, float, float]] = []
"""(name, launched at, ended at) of every all-reduce, in seconds of ``time.perf_counter``."""


class Delay:
    """How many seconds each all-reduce takes at least."""

    seconds = 0.0


class _DelayedWork(dist.Work):
    """A collective that is done when gloo's is, but not before its time."""

    def __init__(self, work: Any) -> None:
        super().__init__()
        self._work = work
        self._launched = time.perf_counter()

    def wait(self, *_: Any) -> bool:
        self._work.wait()
        rest = self._launched + Delay.seconds - time.perf_counter()
        if rest > 0:
            time.sleep(rest)
        TIMELINE.append(("all-reduce", self._launched, time.perf_counter()))
        return True


class _DelayedGroup(dist.ProcessGroup):
    """What the benchmarks need of a process group, on top of gloo."""

    def __init__(self, gloo: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self._gloo = gloo

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        return _DelayedWork(self._gloo.allreduce(_listed(tensors), opts or AllreduceOptions()))

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._gloo.broadcast(tensors, opts or BroadcastOptions())

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier()

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:  # noqa: N802
        return "delayed"


def _listed(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def delayed_gloo(store: Any, rank: int, size: int, timeout: Any) -> dist.ProcessGroup:
    """Makes the group; the argument of ``dist.Backend.register_backend``."""
    gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
    return _DelayedGroup(gloo, rank, size)
