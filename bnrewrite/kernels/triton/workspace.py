"""Memory that reductions need on the way: partial sums, and counters of who has stored them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from bnrewrite.kernels.triton.plan import Plan

_RESERVED = 1 << 20
"""Counters of a device: 4 MiB."""

_OF_A_STREAM = 2048
"""Counters that a stream gets at least; few inputs are cut into more blocks."""

_PER_THREAD = 2
"""How CUDA calls the stream that each thread has for itself."""


class _Reserve:
    """Counters at zero on one device, each given away once and never back.

    Each launch leaves its counters at zero, and launches of one stream run in order, so a stream
    keeps its own. So does a graph: it may be replayed beside whatever runs on the stream of its
    capture, and to set counters to zero would be one more node of it.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._used = 0
        self._of_stream: dict[int, Tensor] = {}
        self._lock = threading.Lock()
        self._ready = torch.cuda.Event()
        # In a thread of its own: in this one memory may come from the pool of a CUDA graph.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._allocate).result()

    def _allocate(self) -> None:
        with torch.cuda.device(self._device):
            self._counters = torch.zeros(_RESERVED, dtype=torch.int32, device="cuda")
            self._ready.record()

    def of_stream(self, num_blocks: int, stream: int) -> Tensor | None:
        """Those of ``stream``, at least ``num_blocks``; None if there are none for it alone."""
        if stream == _PER_THREAD:
            return None
        counters = self._of_stream.get(stream)
        if counters is None or counters.numel() < num_blocks:
            counters = self.take(max(num_blocks, _OF_A_STREAM))
            if counters is not None:
                # First: an interrupt may come now, and another thread uses what it finds.
                torch.cuda.current_stream(self._device).wait_event(self._ready)
                self._of_stream[stream] = counters
        return counters

    def take(self, number: int) -> Tensor | None:
        """``number`` counters at an address that suits wide accesses; None if none are left."""
        with self._lock:
            first = self._used
            if first + number > _RESERVED:
                return None
            self._used += -(-number // 4) * 4
        return self._counters[first : first + number]


_RESERVES: dict[int, _Reserve] = {}


def workspace(plan: Plan, x: Tensor, num_sums: int) -> tuple[Tensor, Tensor]:
    """Room for partial sums, each of so many numbers; a zero for each block or more."""
    if plan.num_partials == 0:
        unused = x.new_empty(0, dtype=torch.float64)
        return unused, unused
    partials = x.new_empty(plan.num_partials * num_sums * plan.C, dtype=torch.float64)
    arrivals = _arrivals(x.get_device(), plan.num_blocks) if x.is_cuda else None
    if arrivals is None:
        arrivals = x.new_zeros(plan.num_blocks, dtype=torch.int32)
    return partials, arrivals


def _arrivals(device: int, num_blocks: int) -> Tensor | None:
    if device != torch.cuda.current_device():
        # Its own stream is asked what it does.
        with torch.cuda.device(device):
            return _arrivals(device, num_blocks)
    reserve = _RESERVES.get(device)
    if torch.cuda.is_current_stream_capturing():
        # Where nothing has run before, there is nothing to take from.
        return None if reserve is None else reserve.take(num_blocks)
    if reserve is None:
        reserve = _RESERVES.setdefault(device, _Reserve(device))
    return reserve.of_stream(num_blocks, torch._C._cuda_getCurrentRawStream(device))
