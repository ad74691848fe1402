"""The order of a backward in eager mode: what runs while a collective is under way.

Of the nodes that are ready, autograd runs the one with the highest sequence number, which is the
one that was created last. The two nodes of a site leave one number free between them, its *slot*:

    number          node
    n + 2           launches the collective of the site's backward
    n + 1           the slot: weight gradients of the convolutions behind the site
    n               ends the collective and makes the input gradient of the site

So a node in the slot runs after the launch and before the end, if it is ready by then. Numbers
decide nothing but the order, which is the same on all ranks that run the same model.
"""

import threading
from typing import Any

import torch
from torch import Tensor


class _Latest(threading.local):
    """The slot of the latest site that this thread has evaluated: numbers are those of a thread."""

    number = 0


_latest = _Latest()


def open_slot() -> None:
    """Opens a slot between the node of autograd that was created last and the next one.

    A node that is never used takes the number, so that no two nodes of sites have the same: which
    of two equal ones runs first may depend on what else a rank computes.
    """
    torch._C._functions.UndefinedGrad()
    _latest.number = torch.autograd._get_sequence_nr() - 1


def hides_collectives(x: Tensor) -> bool:
    """Whether a backward of ``x`` leaves time for other work between launch and end.

    On a GPU the host is what an eager step waits for, and more nodes of autograd take its time;
    while a CUDA graph is captured, only the order of the work counts.
    """
    return not x.is_cuda or torch.cuda.is_current_stream_capturing()


def move_to_slot(node: Any) -> None:
    """Puts a node that was just created into the slot of the latest site.

    Of an earlier forward, or before all others, if this one has no site yet: then the node runs
    last, as it would have.
    """
    node._set_sequence_nr(_latest.number)
