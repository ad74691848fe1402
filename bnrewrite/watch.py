"""Collectives launched without the dispatcher, so that the rank notices if something is wrong.

torch's collectives block in C++ until their timeout, whatever happens elsewhere. Here the waiting
rank checks from time to time, and an error that names the site reports what the backend says.
"""

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bnrewrite.agreement import describe_group, join_open_round
from bnrewrite.errors import PeerError
from bnrewrite.groups import runs_on_gloo
from bnrewrite.naming import sites_of

_SUSPICIOUS_S = 2.0
"""How long a collective takes before its rank looks what the others are doing."""

_YIELDING_S = 0.005
"""How long a rank offers its core to others before it sleeps: to be woken may cost more than most
collectives take."""

_WORK = "_bnrewrite_work"

_OF_THIS_RANK = (torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors of a device, which say nothing of other ranks."""


class _Work(NamedTuple):
    what: str
    work: Any
    group: dist.ProcessGroup
    site: tuple[Any, ...]
    started: float


def runs_unseen(x: Tensor) -> bool:
    """Whether ``x`` is on the CPU or a GPU and no mode or subclass looks at the ops that run on it.

    Then collectives need not be functional ones, nor kernels called by way of the dispatcher.
    """
    return (
        (x.is_cpu or x.is_cuda)
        and type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        # What is_grads_batched makes has the same type.
        and not torch._C._functorch.is_legacy_batchedtensor(x)
    )


def launch(
    what: str,
    result: Tensor,
    group: dist.ProcessGroup,
    site: tuple[Any, ...],
    begin: Callable[[dist.ProcessGroup], Any],
) -> Tensor:
    """Launches a collective into ``result``, which is returned; :func:`finish` waits for it.

    Args:
        what: how messages call it.
        result: where the collective writes.
        group: with more than one rank.
        site: tensors of the sites, by which an error finds their names.
        begin: launches it in the group and gives torch's work.

    Raises:
        PeerError: another rank died or left.
    """
    started = time.monotonic()
    try:
        work = begin(group)
    except _OF_THIS_RANK:
        raise
    except RuntimeError as error:
        raise peer_error(what, group, site, 0.0, error) from error
    setattr(result, _WORK, _Work(what, work, group, site, started))
    return result


def is_watched(pending: Tensor) -> bool:
    """Whether ``pending`` comes from :func:`launch`."""
    return _WORK in pending.__dict__


def finish(pending: Tensor) -> Tensor:
    """``pending`` once it holds the sum.

    Raises:
        PeerError: another rank died, stalled or left.
        ScheduleError: another rank has left the schedule that the ranks agreed on.
    """
    launched: _Work = pending.__dict__.pop(_WORK)
    if pending.is_cuda:
        _put_behind(launched)
        return pending
    work, patience = launched.work, timedelta(seconds=_SUSPICIOUS_S)
    if runs_on_gloo(launched.group):
        _yield_to_others(work)
    while True:
        try:
            work.wait(patience)
            return pending
        except RuntimeError as error:
            waited_s = time.monotonic() - launched.started
            if work.is_completed():
                group, site = launched.group, launched.site
                raise peer_error(launched.what, group, site, waited_s, error) from error
            if waited_s > 2 * _SUSPICIOUS_S:
                join_open_round(launched.group.group_name)
            patience = timedelta(seconds=1)


def _put_behind(launched: _Work) -> None:
    """Makes the stream wait, and not the host, unless the backend knows no streams."""
    try:
        launched.work.wait()
    except _OF_THIS_RANK:
        raise
    except RuntimeError as error:
        waited_s = time.monotonic() - launched.started
        group, site = launched.group, launched.site
        raise peer_error(launched.what, group, site, waited_s, error) from error


def _yield_to_others(work: Any) -> None:
    """Waits for ``work`` a short time without sleeping, while whoever wants the core gets it."""
    if not hasattr(os, "sched_yield"):
        return
    end = time.monotonic() + _YIELDING_S
    while not work.is_completed() and time.monotonic() < end:
        os.sched_yield()


def peer_error(
    what: str,
    group: dist.ProcessGroup,
    site: tuple[Any, ...],
    waited_s: float,
    error: RuntimeError,
    *,
    sites: str = "",
) -> PeerError:
    """The error for a collective that failed with ``error``; ``sites`` names them if known."""
    ranks, this = [], -1
    with contextlib.suppress(KeyError, ValueError):
        ranks, this = dist.get_process_group_ranks(group), dist.get_rank()
    sites = sites or sites_of(site)
    return PeerError(
        f"{sites}: the {what} over {describe_group(group.group_name)} (ranks {ranks}, "
        f"this is rank {this}) failed after {waited_s:.1f} s: another rank died, stalled or left, "
        "or runs other layers. The group can no longer be used, but the model can: call "
        "torch.distributed.destroy_process_group(), form a new group of the remaining ranks and "
        f"continue. The backend says: {error}"
    )
