"""Random schedules for shuffled statistics: every rank computes the same permutation of ranks."""

import torch
from torch import Tensor


def shuffle_peers(step: Tensor, site: int, seed: int, rank: int, world_size: int) -> Tensor:
    """The rank that ``rank`` borrows statistics from, and the rank that borrows its statistics.

    The ranks are sorted by a hash of (seed, site, step, rank), and each borrows from the next in
    this order, the last from the first: a permutation of one cycle, which has no fixed point. Every
    rank computes the same order, from integers, on any device.

    Args:
        step: scalar, int64, the same on every rank.
        site: number of the site.
        seed: of the schedule.
        rank: of this process in the group.
        world_size: ranks of the group, at least 2.

    Returns:
        (2,), int64: the peer and the borrower.

    Reference: G. Steele, D. Lea and C. Flood, "Fast Splittable Pseudorandom Number Generators",
    2014 (https://doi.org/10.1145/2714064.2660195), for the hash.
    """
    state = _mix64(step + _signed64(_GOLDEN * seed)) + _signed64(_GOLDEN * site)
    ranks = torch.arange(world_size, device=step.device)
    keys = _mix64(_mix64(state) + ranks * _signed64(_GOLDEN))
    order = torch.argsort(keys, stable=True)
    following = order.roll(-1)
    peer = (following * (order == rank)).sum()
    borrower = (order * (following == rank)).sum()
    return torch.stack([peer, borrower])


_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: multiples of it spread over all bits."""


def _signed64(value: int) -> int:
    """``value`` modulo 2^64 as a signed integer, as int64 arithmetic wraps around."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix64(values: Tensor) -> Tensor:
    """The finalizer of SplitMix64, a bijection of int64 that spreads every bit over all others."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        # Shifts of int64 keep the sign; the mask makes them logical.
        high = (values >> shift) & ((1 << (64 - shift)) - 1)
        values = (values ^ high) * _signed64(factor)
    return values
