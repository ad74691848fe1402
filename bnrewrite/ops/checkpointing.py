"""What activation checkpointing need not communicate again.

A checkpointed forward runs twice, and its second run would repeat its collectives. So the first run
leaves the results, 2C + 1 numbers per evaluation, with the checkpoint that will run it again:

    forward      checkpoint(block) -> site -> collective, kept by the checkpoint
    backward     checkpoint runs block again -> site -> what the checkpoint kept

They go when the checkpoint goes, with the graph. Which checkpoint an evaluation belongs to is read
off the stack of Python, where torch's two implementations can be told apart and nest in any way:
every checkpoint whose first run is under way keeps a result, and the innermost one that runs again
gives it. All ranks see the same, since none of it depends on values. Checkpoints of other
libraries, and of torch's ``_composable``, are not known here; what they run communicates again, as
do compiled graphs and sites without running statistics, which have nothing to be known by.
"""

import contextlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from bnrewrite.errors import BnRewriteError
from bnrewrite.groups import NO_GROUP
from bnrewrite.guards import is_compiling
from bnrewrite.kernels.statistics import recomputes
from bnrewrite.ops.library import below_autograd
from bnrewrite.torch_versions import run_checkpointed

T = TypeVar("T")

_RECORD = "_bnrewrite_record"
"""Attribute of what torch keeps of a checkpoint, in which its record lies."""


class _Record:
    """What one checkpointed forward communicated: results by sites, in order."""

    def __init__(self) -> None:
        self._kept: dict[tuple, list[tuple]] = defaultdict(list)
        self._run: Any = None
        self._used: Counter[tuple] = Counter()

    def keep(self, key: tuple, shapes: list, buffers: Sequence[Tensor], result: Any) -> None:
        # The buffers are those of the key, which must not be given to others meanwhile.
        self._kept[key].append((shapes, buffers, result))

    def take(self, key: tuple, shapes: list, run: Any) -> Any:
        """What the evaluation kept that run number ``run`` of the forward now repeats."""
        if run != self._run:
            # One graph may be run backward several times.
            self._run = run
            self._used.clear()
        index = self._used[key]
        self._used[key] += 1
        if index >= len(self._kept[key]):
            return None
        then, _, result = self._kept[key][index]
        if then != shapes:
            raise BnRewriteError(
                f"activation checkpointing recomputes a forward and finds a BatchNorm input of "
                f"shape {shapes[0]} where the first run had {then[0]}. Checkpoint only code that "
                "does the same again."
            )
        return result


def communicate_once(
    inputs: Sequence[Tensor],
    buffers: Sequence[Tensor | None],
    group: str,
    communicate: Callable[[], T],
) -> T:
    """The result of ``communicate``, from the first run where checkpointing runs a forward again.

    Args:
        inputs: of the sites that communicate together.
        buffers: their running means, by which they are known.
        group: name of the process group, or "".
        communicate: gives tensors that nobody changes; it runs below autograd.
    """
    # The common case pays these comparisons.
    if (
        group == NO_GROUP
        or is_compiling()
        or not _may_be_checkpointed()
        or any(buffer is None for buffer in buffers)
    ):
        with below_autograd():
            return communicate()
    key = (group, *(id(buffer) for buffer in buffers))
    shapes = [tuple(x.shape) for x in inputs]
    repeated, run, keepers = _enclosing()
    record = getattr(repeated, _RECORD, None)
    result = None if record is None else record.take(key, shapes, run)
    if result is None:
        with below_autograd(), hidden_from_policies():
            result = communicate()
    for keeper in keepers:
        if not hasattr(keeper, _RECORD):
            setattr(keeper, _RECORD, _Record())
        getattr(keeper, _RECORD).keep(key, shapes, buffers, result)
    return result


def hidden_from_policies() -> contextlib.AbstractContextManager[None]:
    """Hides ops from selective checkpointing, which counts on each of them running again."""
    return _hidden() if torch._C._len_torch_dispatch_stack() else _NOTHING


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _hidden() -> Iterator[None]:
    modes = _get_current_dispatch_mode_stack()
    others = [mode for mode in modes if not isinstance(mode, _POLICIES)]
    if len(others) == len(modes):
        yield
        return
    with _disable_current_modes():
        for mode in others:
            _push_mode(mode)
        try:
            yield
        finally:
            for _ in others:
                _pop_mode()


_POLICIES = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)


def _may_be_checkpointed() -> bool:
    """Whether a checkpoint may be on the stack: the first run has one of these, and so the second.

    The reentrant implementation runs the first without gradients, the other one under hooks.
    """
    return (
        not torch.is_grad_enabled()
        or recomputes()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _enclosing() -> tuple[Any, Any, list[Any]]:
    """The checkpoint that runs this forward again, its run, and those inside whose first it is."""
    keepers = []
    frame = sys._getframe(2)
    while frame is not None:
        place = _PLACES.get(frame.f_code)
        if place == "first":
            keepers.append(frame.f_locals["ctx"])
        elif place == "first under hooks" and "gen" in frame.f_locals:
            generator = frame.f_locals["gen"].gi_frame
            if generator is not None and "new_frame" in generator.f_locals:
                keepers.append(generator.f_locals["new_frame"])
        elif place == "again":
            return frame.f_locals["ctx"], torch._C._current_graph_task_id(), keepers
        elif place == "again under hooks":
            return frame.f_locals["frame"], frame.f_locals["gid"], keepers
        elif place == "backward":
            # Whatever is further out waits for this backward and runs nothing itself.
            break
        frame = frame.f_back
    return None, None, keepers


def _places() -> dict[CodeType, str]:
    """Which functions of torch mean what on the stack."""
    implementation = checkpoint.CheckpointFunction
    hooks = checkpoint._checkpoint_hook.__init__.__code__.co_consts
    function = run_checkpointed
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return {
        implementation.forward.__code__: "first",
        implementation.backward.__code__: "again",
        function.__code__: "first under hooks",
        **{
            code: "again under hooks"
            for code in hooks
            if isinstance(code, CodeType) and code.co_name == "unpack_hook"
        },
        torch.autograd.backward.__code__: "backward",
        torch.autograd.grad.__code__: "backward",
    }


_PLACES = _places()
