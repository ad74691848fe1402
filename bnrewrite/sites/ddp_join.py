"""Uneven input under ``DistributedDataParallel.join()``: ranks that are done shadow the others.

DDP's own shadow makes the all-reduces of its gradient buckets and knows nothing of those of
BatchNorm, which lie between them. A rank that is done therefore runs the model on an empty batch:
its forward and backward make the collectives of BatchNorm in the order of the others, and its
parameters, stand-ins of DDP's, launch a bucket of zeros where the others launch the bucket.
"""

import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from bnrewrite.errors import BnRewriteError, PeerError, ScheduleError

_SHADOW = "_bnrewrite_shadow"


def shadow_when_done(ddp: DistributedDataParallel) -> None:
    """Makes ``ddp.join()`` work with the synchronized BatchNorm of its module.

    It is called during a forward of ``ddp``, on every rank.
    """
    if _SHADOW not in vars(ddp):
        vars(ddp)[_SHADOW] = _Shadow(ddp)


class _Shadow:
    """What a rank does in place of DDP's shadow; DDP's hook calls the methods that it replaces."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._inputs: tuple[Any, Any, bool] | None = None
        self._outputs: list[Tensor] = []
        self._leaves: dict[int, Tensor] = {}
        # Weak, so that DDP and its process group go when the user lets go of them.
        self._reference = weakref.ref(ddp)
        frame = _forward_frame()
        if frame is not None and ddp._join_config.enable:
            # This forward is under way already; the hook sees those to come.
            self._note(ddp, frame.f_locals["inputs"], frame.f_locals["kwargs"])
        ddp.register_forward_pre_hook(self._note, with_kwargs=True)
        for name, method in (
            ("_check_global_requires_backward_grad_sync", self._forward),
            ("_match_all_reduce_for_bwd_pass", self._backward),
        ):
            vars(ddp)[name] = method

    @property
    def _ddp(self) -> Any:
        return self._reference()

    def __getstate__(self) -> dict[str, Any]:
        return {"inputs": self._inputs, "ddp": self._ddp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._inputs = state["inputs"]
        self._outputs, self._leaves = [], {}
        self._reference = weakref.ref(state["ddp"])

    def _note(self, ddp: Any, args: Any, kwargs: Any) -> None:
        """Notes what the last inputs looked like, in empty tensors."""
        if ddp._join_config.enable:
            args, kwargs = tree_map(_emptied, (args, kwargs))
            self._inputs = args, kwargs, torch.is_grad_enabled()

    def _forward(self, is_joined_rank: bool) -> Any:
        """In place of DDP's method of this name: the last that happens before the forward."""
        check = DistributedDataParallel._check_global_requires_backward_grad_sync
        synchronizes = check(self._ddp, is_joined_rank)
        if not is_joined_rank:
            return synchronizes
        if self._inputs is None:
            raise BnRewriteError(
                "a rank had no input at all, so it cannot shadow the BatchNorm collectives of the "
                "others under DistributedDataParallel.join(). Give every rank at least one batch."
            )
        args, kwargs, grad_enabled = self._inputs
        module = self._ddp.module
        self._leaves = {id(p): _leaf(p) for p in module.parameters()}
        stand_ins = {name: self._leaves[id(p)] for name, p in module.named_parameters()}
        with torch.set_grad_enabled(grad_enabled):
            outputs = self._guarded(lambda: functional_call(module, stand_ins, args, kwargs))
        self._outputs = [
            leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not synchronizes:
            self._run_backward()
        return synchronizes

    def _backward(self) -> None:
        """In place of DDP's method of this name: a bucket as soon as its parameters are ready."""
        buckets = self._ddp.reducer._get_zeros_like_grad_buckets()
        waiting = [{id(p) for p in bucket.parameters()} for bucket in buckets]
        works: list[Any] = []

        def ready(*parameters: int) -> None:
            for missing in waiting:
                missing.difference_update(parameters)
            while len(works) < len(buckets) and not waiting[len(works)]:
                works.append(self._ddp.reducer._run_comm_hook(buckets[len(works)]))

        used = _reached(self._outputs)
        # DDP takes parameters that the output does not depend on for ready at once.
        ready(*(key for key, leaf in self._leaves.items() if leaf not in used))
        for key, leaf in self._leaves.items():
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(lambda _, key=key: ready(key))
        self._run_backward()
        ready(*self._leaves)
        for work in works:
            work.wait()

    def _run_backward(self) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._guarded(
                lambda: torch.autograd.backward(outputs, [*map(torch.zeros_like, outputs)])
            )
        self._leaves = {}

    def _guarded(self, run: Any) -> Any:
        try:
            return run()
        except (PeerError, ScheduleError):
            raise
        except Exception as error:
            raise BnRewriteError(
                "a rank that has run out of input runs "
                f"{type(self._ddp.module).__name__} on an empty batch to shadow the BatchNorm "
                f"collectives of the others under DistributedDataParallel.join(), and that failed: "
                f"{type(error).__name__}: {error}. Make the model accept a batch of size zero, or "
                "give all ranks the same number of batches."
            ) from error


def running_ddp() -> DistributedDataParallel | None:
    """The DDP instance whose forward runs in this thread; the class knows one for all threads."""
    frame = _forward_frame()
    return None if frame is None else frame.f_locals["self"]


def _forward_frame() -> FrameType | None:
    """The frame of DDP's forward, if it is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not DistributedDataParallel.forward.__code__:
        frame = frame.f_back
    return frame


def _emptied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    empty = value.detach()[:0] if value.dim() else value.detach()
    return empty.clone().requires_grad_(value.requires_grad)


def _leaf(parameter: Tensor) -> Tensor:
    return parameter.detach().requires_grad_(parameter.requires_grad)


def _reached(outputs: list[Tensor]) -> set[Any]:
    """Leaves that ``outputs`` depend on."""
    found: set[Any] = set()
    todo = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found
