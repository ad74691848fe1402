"""One name for each thing that torch 2.11 to 2.15 do differently.

Where possible, the code tests for a feature, not for a version number. One more difference is in
:data:`bnrewrite.guards.is_compiling`, which needs what that module knows about Dynamo.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx._symbolic_trace
from torch.utils import checkpoint

OLDEST, NEWEST = (2, 11), (2, 15)
"""Between these, ends included, the tests pass."""


def is_tested() -> bool:
    """Whether the torch that runs is one of those."""
    return OLDEST <= tuple(map(int, torch.__version__.split(".")[:2])) <= NEWEST


_fx: Any = torch.fx._symbolic_trace


_HAS_FLAG = hasattr(_fx, "_is_fx_tracing_flag")
"""A global up to torch 2.13, then one for each thread."""


def _flag() -> bool:
    return _fx._is_fx_tracing_flag


def _set_flag(value: bool) -> None:
    _fx._is_fx_tracing_flag = value


is_fx_tracing: Callable[[], bool] = _flag if _HAS_FLAG else _fx._get_is_fx_tracing
"""Whether ``torch.fx``, in a trace of ours or of somebody else, records what runs."""

_set_fx_tracing: Callable[[bool], None] = _set_flag if _HAS_FLAG else _fx._set_is_fx_tracing


@contextmanager
def fx_tracing() -> Iterator[None]:
    """Has torch take what runs for recorded by ``torch.fx``."""
    before = is_fx_tracing()
    _set_fx_tracing(True)
    try:
        yield
    finally:
        _set_fx_tracing(before)


def autograd_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` as torch has it, whatever stands in its place now."""
    return _apply.__get__(None, function)


# A class method of Python up to torch 2.13, one of C from 2.14 on.
_apply: Any = vars(torch.autograd.Function)["apply"]

run_checkpointed: Any = getattr(checkpoint, "_checkpoint_impl", checkpoint.checkpoint)
"""The function that runs a forward in ``torch.utils.checkpoint``, an inner one from 2.14 on."""
