"""Functions that act on more than values, as the traced code finds them while a trace records.

They stand in their modules until the conversion ends, and in the globals of code that imported
them by name. A trace would have them act once, and its graph never.
"""

import builtins
import contextlib
import functools
import gc
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from bnrewrite.capture.frames import is_for_traced_code, is_ours
from bnrewrite.capture.refusals import DRAWS, refusing
from bnrewrite.sites.tracing import tracer_here

_OF_THE_SYSTEM = (
    "abort", "chdir", "close", "copy_file_range", "dup2", "execv", "execve", "fork", "forkpty",
    "ftruncate", "kill", "killpg", "link", "listdir", "mkdir", "mkfifo", "mknod", "nice", "open",
    "pipe", "posix_spawn", "posix_spawnp", "putenv", "pwrite", "read", "remove", "rename",
    "replace", "rmdir", "scandir", "sched_setaffinity", "sendfile", "setpriority", "symlink",
    "system", "truncate", "umask", "unlink", "unsetenv", "write", "writev",
)  # fmt: skip
"""Those of ``os``, but for some that Python's library finds in sets by their identity."""

_SETTING = re.compile(
    r"_?set_(?!grad|fwd_grad|autocast|dispatch|torch_function|skip_next|tensor_metadata|conj|neg"
    r"|generator|meta_in|tracing|value_trace|rng|worker|graph|printoptions)"
)
"""Names of functions that set something for all of torch, and no context of operations."""

_GPU = ("empty_cache", "synchronize")

_MARKS = ("mark", "range_pop", "range_push")

_stand_ins: dict[int, tuple[Any, Callable[..., Any]]] = {}
"""By identity, what is replaced now and by what."""

_REFUSING: set[Any] = set()
"""All that ever stood in for something."""


def is_stand_in(value: Any) -> bool:
    """Whether ``value`` stands in for a function, and is no name of the user's."""
    return isinstance(value, FunctionType) and value in _REFUSING


def stand_in(value: Any) -> Callable[..., Any] | None:
    """What stands in for a function, if something does."""
    found = _stand_ins.get(id(value))
    return None if found is None else found[1]


@contextlib.contextmanager
def refusing_acts() -> Iterator[None]:
    """Replaces the functions in their modules."""
    homes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for home, reasons in _reasons():
            names = vars(home)
            before = {name: names[name] for name in reasons}
            new = {name: _refusing(before[name], reasons[name]) for name in reasons}
            homes.append((names, before))
            names.update(new)
            _stand_ins.update((id(before[name]), (before[name], new[name])) for name in reasons)
            _REFUSING.update(new.values())
        yield
    finally:
        _stand_ins.clear()
        for names, before in homes:
            names.update(before)


@functools.cache
def _reasons() -> tuple[tuple[ModuleType, dict[str, str]], ...]:
    """Modules, and by the names of their functions why no trace may call them."""
    settings = {
        home: {name: "changes a setting of torch" for name in vars(home) if _SETTING.match(name)}
        for home in (torch, torch._C)
    }
    files = {"open": "opens a file"}
    settings[torch]["save"] = "saves a file"
    others: dict[ModuleType, dict[str, str]] = {
        builtins: files,
        io: files,
        os: {name: f"calls os.{name}()" for name in (*_OF_THE_SYSTEM, "urandom")},
        np.random: {"default_rng": DRAWS},
        gc: {"collect": "runs the garbage collector"},
        warnings: {"warn": "warns"},
        torch.cuda: {name: f"calls torch.cuda.{name}()" for name in _GPU},
        torch.cuda.nvtx: dict.fromkeys(_MARKS, "emits marks for a profiler"),
    }
    return tuple(
        (home, {name: reason for name, reason in reasons.items() if name in vars(home)})
        for home, reasons in (*settings.items(), *others.items())
    )


def _refusing(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    return _warning(function) if reason == "warns" else refusing(function, reason)


@functools.lru_cache(8)
def _warning(warn: Callable[..., Any]) -> Callable[..., Any]:
    """``warn``, which traced code must not call; what torch warns of is no doing of its caller."""

    @functools.wraps(warn)
    def warning(
        message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **kwargs: Any
    ) -> None:
        tracer = tracer_here()
        if tracer is not None and tracer.recording:
            frame = sys._getframe(1)
            if not is_ours(frame.f_code.co_filename) and is_for_traced_code(frame):
                tracer.refuse("warns")
        # One frame more is between the warning and whom it is about.
        warn(message, category, max(stacklevel, 1) + 1, *args, **kwargs)

    return warning
