"""Memory that reductions need on the way: partial sums, and counters of who has stored them."""

import functools

import torch
from torch import Tensor

from bnrewrite.kernels.triton.plan import Plan

_MOST_BLOCKS = 8192
_RESERVED = 1 << 18

_OF_STREAM: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
_RESERVES: dict[int, "_Reserve"] = {}


class _Reserve:
    """Counters at zero, each given away once.

    A graph keeps its counters: it may be replayed beside whatever runs on the stream of its
    capture. They come from here because to set them to zero would be one more node of the graph.
    """

    def __init__(self, device: int) -> None:
        self._counters = torch.zeros(_RESERVED, dtype=torch.int32, device=f"cuda:{device}")
        self._used = 0

    def take(self, number: int) -> Tensor | None:
        """``number`` counters at an address that suits wide accesses; None if none are left."""
        first = self._used
        if first + number > _RESERVED:
            return None
        self._used += -(-number // 4) * 4
        return self._counters[first : first + number]


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float64, device=device)


def workspace(plan: Plan, x: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Room for partial sums (splits, rows, C) or more, and a zero for each block or more.

    Each launch leaves the counters at zero, and launches of one stream run in order.
    """
    if plan.num_splits == 1:
        unused = _nothing(x.device)
        return unused, unused
    size = plan.num_splits * num_rows * plan.C
    if not x.is_cuda:
        return _partials(x, size), x.new_zeros(plan.num_blocks, dtype=torch.int32)
    device = x.get_device()
    if torch.cuda.is_current_stream_capturing():
        reserve = _RESERVES.get(device)
        arrivals = None if reserve is None else reserve.take(plan.num_blocks)
        if arrivals is None:
            arrivals = x.new_zeros(plan.num_blocks, dtype=torch.int32)
        return _partials(x, size), arrivals
    key = device, torch._C._cuda_getCurrentRawStream(device)
    partials, arrivals = _OF_STREAM.get(key, (None, None))
    if partials is None or arrivals is None:
        arrivals = x.new_zeros(max(plan.num_blocks, _MOST_BLOCKS), dtype=torch.int32)
        if device not in _RESERVES:
            _RESERVES[device] = _Reserve(device)
    elif arrivals.numel() < plan.num_blocks:
        arrivals = x.new_zeros(plan.num_blocks, dtype=torch.int32)
    if partials is None or partials.numel() < size:
        partials = _partials(x, size)
    _OF_STREAM[key] = partials, arrivals
    return partials, arrivals


def _partials(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.float64)
