"""Buffers that ``DistributedDataParallel`` need not broadcast before every forward.

Sites that take their statistics over all ranks update their buffers alike, bit for bit. DDP's own
broadcast, in its constructor and before the first forward, has made them equal by then. When a rank
loads a state afterwards, its next forward asks the others to take over the buffers of rank 0.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bnrewrite.agreement import Shared


class DDPBuffers(Shared):
    """What one schedule has taken out of the broadcasts of a DDP instance."""

    def __init__(self) -> None:
        super().__init__()
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._left_out: set[str] = set()
        self._group = ""
        self._hook: Any = None
        # What the buffers held before a state was loaded.
        self._before: list[Tensor] = []

    def leave_out(
        self, ddp: DistributedDataParallel, members: list[Any], before_forward: Callable[..., None]
    ) -> None:
        """Leaves buffers that are equal on all ranks out of the broadcasts of ``ddp``.

        ``before_forward`` is called before its forwards from then on.

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
        self._group = group
        # What the user has left out himself stays out.
        self._left_out = names - set(ddp.parameters_to_ignore)
        ddp.parameters_to_ignore = set(ddp.parameters_to_ignore) | names
        ddp._assign_modules_buffers()
        if names:
            self._hook = ddp.register_forward_pre_hook(before_forward)

    def are_left_out_of(self, ddp: DistributedDataParallel) -> bool:
        """Whether ``ddp`` is the instance of the last :meth:`leave_out`."""
        return self._ddp is not None and self._ddp() is ddp

    def put_back(self) -> None:
        """Undoes :meth:`leave_out`."""
        ddp = None if self._ddp is None else self._ddp()
        if ddp is not None:
            ddp.parameters_to_ignore = set(ddp.parameters_to_ignore) - self._left_out
            ddp._assign_modules_buffers()
        if self._hook is not None:
            self._hook.remove()
        self._ddp = self._hook = None
        self._left_out = set()
        self._before = []

    def undo(self) -> Callable[[], None]:
        """What makes all as it is now, after a :meth:`put_back`, be it broken off halfway."""
        fields = dict(vars(self))
        ddp = None if self._ddp is None else self._ddp()
        hooks = {} if ddp is None else dict(ddp._forward_pre_hooks)
        ignored = set() if ddp is None else ddp.parameters_to_ignore

        def undo() -> None:
            vars(self).update(fields)
            if ddp is not None:
                ddp.parameters_to_ignore = ignored
                ddp._assign_modules_buffers()
                ddp._forward_pre_hooks.clear()
                ddp._forward_pre_hooks.update(hooks)

        return undo

    def tensors(self, group: str) -> list[Tensor]:
        """Buffers that no broadcast over ``group`` makes equal, in the order of all ranks."""
        ddp = None if self._ddp is None else self._ddp()
        if ddp is None or group != self._group:
            return []
        return [ddp.module.get_buffer(name) for name in sorted(self._left_out)]

    def before_load(self) -> None:
        """Notes what the buffers hold; a site calls it before it loads a state."""
        if self._left_out and not self._before:
            self._before = [buffer.clone() for buffer in self.tensors(self._group)]

    def loaded(self, group: str | None = None) -> bool:
        """Whether buffers, of ``group`` or any, differ from before a load that others may lack."""
        if not self._before or group not in (None, self._group):
            return False
        pairs = zip(self.tensors(self._group), self._before, strict=False)
        if all(_have_same_bits(now, before) for now, before in pairs):
            # A state that was put back has changed nothing; what changes from now on is no load.
            self._before = []
        return bool(self._before)

    def forget_load(self) -> None:
        """Notes that all ranks have the same again."""
        self._before = []


def _have_same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two buffers of one shape and dtype are equal, NaN for NaN."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
