"""What traced code must not call, since a graph would lose it, or do it once."""

import contextlib
import functools
import logging
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle

from bnrewrite.capture.frames import is_for_traced_code, is_of_package, is_ours
from bnrewrite.capture.proxy import PROXIES
from bnrewrite.sites.tracing import tracer_here


@functools.lru_cache(1024)
def refusing(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """``function``, which traced code must not call."""

    @functools.wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        tracer = tracer_here()
        if tracer is not None and tracer.recording:
            frame: Any = sys._getframe(1)
            if frame.f_globals.get("__name__") == _ASKS:
                frame = frame.f_back
            if not is_of_package(frame) and is_for_traced_code(frame):
                tracer.refuse(reason)
        return function(*args, **kwargs)

    return refusing


_ASKS = "bnrewrite.capture.questions"
"""Has what stands for builtins such as ``getattr`` in traced code."""


def enter_generator(manager: Any) -> Any:
    """``__enter__`` of a context of ``contextlib.contextmanager``; those of torch set something."""
    tracer = tracer_here()
    if tracer is not None and tracer.recording and not is_ours(sys._getframe(1).f_code.co_filename):
        function = manager.func
        if str(function.__module__).startswith("torch"):
            tracer.refuse(f"enters {function.__name__}")
    return _enter(manager)


def node_type_of_tree(tree: Any) -> Any:
    """What torch's trees ask of each value: a proxy may be a tree of its own."""
    if type(tree) in PROXIES and tree.tracer.recording:
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == _pytree.__name__ and frame.f_back is not None:
            frame = frame.f_back
        if not is_ours(frame.f_code.co_filename):
            tree.tracer.refuse("asks for the structure of a computed value")
    return _node_type(tree)


_node_type = _pytree._get_node_type

_enter = contextlib._GeneratorContextManager.__enter__

DRAWS = "draws random numbers outside the graph"

_GRADIENTS = "enters no_grad or enable_grad"

EFFECTS: tuple[tuple[Any, str, str], ...] = (
    (torch.no_grad, "__enter__", _GRADIENTS),
    (torch.enable_grad, "__enter__", _GRADIENTS),
    (torch.set_grad_enabled, "__init__", _GRADIENTS),
    (torch.inference_mode, "__enter__", "enters inference_mode"),
    (torch.amp.autocast_mode.autocast, "__enter__", "enters autocast"),
    (
        torch.autograd.graph.saved_tensors_hooks,
        "__enter__",
        "enters a checkpoint or saved-tensor hooks",
    ),
    *(
        (nn.Module, f"register_{kind}", "registers a hook")
        for kind in (
            "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook",
            "backward_hook",
        )
    ),
    (RemovableHandle, "remove", "removes a hook"),
    (nn.Module, "__delattr__", "deletes an attribute"),
    (nn.Module, "zero_grad", "calls zero_grad()"),
    # After it has found who logs.
    (logging.Logger, "handle", "logs a message"),
    (contextlib.suppress, "__enter__", "catches exceptions"),
    # Queues, semaphores, events, barriers and futures of Python do it before they change.
    (threading.Condition, "__enter__", "changes an object that other threads may wait for"),
    (threading.Thread, "start", "starts a thread"),
    (subprocess.Popen, "__init__", "starts a process"),
    (socket.socket, "__init__", "opens a socket"),
    (torch.backends.ContextProp, "__set__", "changes a setting of torch"),
    (torch.cuda.StreamContext, "__enter__", "enters a CUDA stream"),
    # Generators of its own; those that were there before are looked at.
    (random.Random, "__init__", DRAWS),
    (random.SystemRandom, "random", DRAWS),
    (random.SystemRandom, "getrandbits", DRAWS),
    # It shows a progress bar, which starts a thread.
    (fx.Interpreter, "run", "runs a graph in torch.fx.Interpreter"),
)  # fmt: skip
"""What a graph would lose or do once, whatever has it done: a class, a method and the reason."""
