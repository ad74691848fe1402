"""Buffers that ``DistributedDataParallel`` need not broadcast before every forward.

Sites that take their statistics over all ranks update their buffers alike, bit for bit. DDP's own
broadcast, in its constructor and before the first forward, has made them equal by then.
"""

import weakref
from typing import Any

from torch.nn.parallel import DistributedDataParallel


class DDPBuffers:
    """What one schedule has taken out of the broadcasts of a DDP instance."""

    def __init__(self) -> None:
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._left_out: set[str] = set()

    def leave_out(self, ddp: DistributedDataParallel, members: list[Any]) -> None:
        """Leaves buffers that are equal on all ranks out of the broadcasts of ``ddp``.

        It is called when all ranks have agreed, so that all of them change their broadcast alike.
        """
        self.put_back()
        process_group: Any = ddp.process_group
        group = process_group.group_name
        equal = {
            id(buffer) for member in members for buffer in member._bnrewrite_equal_buffers(group)
        }
        names = {name for name, buffer in ddp.module.named_buffers() if id(buffer) in equal}
        self._ddp = weakref.ref(ddp)
        # What the user has left out himself stays out.
        self._left_out = names - set(ddp.parameters_to_ignore)
        ddp.parameters_to_ignore = set(ddp.parameters_to_ignore) | names
        ddp._assign_modules_buffers()

    def put_back(self) -> None:
        """Undoes :meth:`leave_out`."""
        ddp = None if self._ddp is None else self._ddp()
        if ddp is not None:
            ddp.parameters_to_ignore = set(ddp.parameters_to_ignore) - self._left_out
            ddp._assign_modules_buffers()
        self._ddp = None
        self._left_out = set()
