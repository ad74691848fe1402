"""What traces change in torch and Python while they run, and back.

Changing a method of ``torch.nn.Module`` costs about as much as tracing a block, since all its
subclasses take notice. So :func:`patched` does it once for all traces of a conversion, for
whichever tracer runs; only the classes of the modules that are traced change for each trace.
"""

import contextlib
import math
import os
import random
import threading
from collections.abc import Iterator
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.fx._symbolic_trace as fx_trace
from torch import fx, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bnrewrite.capture.acts import refusing_acts, stand_in
from bnrewrite.capture.asking import asks_for_named
from bnrewrite.capture.bytecode import is_used_as_value
from bnrewrite.capture.comparisons import giving_code_back
from bnrewrite.capture.questions import QUESTIONS
from bnrewrite.capture.refusals import (
    DRAWS,
    EFFECTS,
    enter_generator,
    node_type_of_tree,
    refusing,
)
from bnrewrite.sites.tracing import tracer_here
from bnrewrite.torch_versions import autograd_apply

_write = nn.Module.__setattr__
_call = nn.Module.__call__
_init = nn.Module.__init__


RECORDING = fx_trace._create_wrapped_func(math.sqrt).__code__
"""The code of functions that stand for others, and record calls with proxies."""


class Patches:
    """What is changed now, by one thread at a time.

    Attributes:
        lock: held while anything is changed.
        patcher: keeps the functions that record calls with proxies, like ``math.sqrt``; None while
            nothing is changed.
        recorded: their identities.
        keep_type: identities of globals in which ``type`` stays what it is.
    """

    keep_type: ClassVar[set[int]] = set()

    lock: ClassVar[Any] = threading.RLock()
    patcher: Any = None
    recorded: ClassVar[set[int]] = fx_trace.Tracer()._autowrap_function_ids


def _renew_lock() -> None:
    Patches.lock = threading.RLock()


# Another thread may hold it when a process forks, and is not there in the child.
os.register_at_fork(after_in_child=_renew_lock)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Makes modules and functions tell the tracer that runs, if one does; may be nested."""
    with Patches.lock:
        if Patches.patcher is not None:
            yield
            return
        with _patched_once():
            yield


@contextlib.contextmanager
def _patched_once() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for holder, name, new in (
            (nn.Module, "__setattr__", _attribute),
            (nn.Module, "__call__", _module_call),
            (nn.Module, "__init__", _module_init),
            (torch.autograd.Function, "apply", classmethod(_function_call)),
            (contextlib._GeneratorContextManager, "__enter__", enter_generator),
            (_pytree, "_get_node_type", node_type_of_tree),
            *(
                (holder, name, refusing(vars(holder)[name], reason))
                for holder, name, reason in EFFECTS
            ),
        ):
            stack.callback(setattr, holder, name, vars(holder)[name])
            setattr(holder, name, new)
        for name in _READS:
            # torch's own are those of a base in C.
            stack.callback(delattr, torch.Tensor, name)
            setattr(torch.Tensor, name, _refusing_read(name))
        stack.enter_context(refusing_acts())
        stack.enter_context(giving_code_back())
        stack.callback(setattr, Patches, "patcher", None)
        stack.callback(Patches.keep_type.clear)
        Patches.patcher = stack.enter_context(fx_trace._new_patcher())
        # What the user gave to torch.fx.wrap.
        fx_trace._patch_wrapped_functions(Patches.patcher)
        record_functions(vars(math))
        yield


_READS = ("tolist", "stride", "is_contiguous", "storage_offset", "data_ptr", "grad", "_version")
"""What traced code may ask a tensor without running an operation: a graph would keep the answer."""


def _refusing_read(name: str) -> Any:
    read, reason = getattr(torch.Tensor, name), f"reads {name} of its own tensors"
    if not hasattr(read, "__set__"):
        return refusing(read, reason)
    return property(refusing(read.__get__, reason), read.__set__, read.__delete__)


def record_functions(home: Any) -> None:
    """Has functions like ``math.sqrt`` in the globals ``home`` recorded if a proxy is given."""
    fx_trace._autowrap_check(Patches.patcher, home, Patches.recorded)


def record_questions(function: FunctionType, names: frozenset[str], tracer: Any) -> None:
    """Has ``function``, whose code uses ``names``, ask ``tracer`` about proxies.

    What stands for a builtin is called like it, and is no such class: code that uses ``type``
    itself as a value keeps it, and so does all code with the same globals.
    """
    home = function.__globals__
    if "type" in names and is_used_as_value(function.__code__, "type"):
        if home.get("type") is QUESTIONS["type"]:
            tracer.refuse("uses type as a value, next to code that asks for types")
        Patches.keep_type.add(id(home))
    if id(home) in Patches.keep_type and asks_for_named(function, tracer.root) is not None:
        tracer.refuse("asks for classes of modules, next to code that uses type as a value")
    for name in names & QUESTIONS.keys():
        if name not in home and not (name == "type" and id(home) in Patches.keep_type):
            Patches.patcher.patch(home, name, QUESTIONS[name])


def record_act(home: dict[str, Any], name: str) -> bool:
    """Whether ``name`` in globals is a function that no trace may call; replaces it there."""
    new = stand_in(home[name])
    if new is not None:
        Patches.patcher.patch(home, name, new, deduplicate=False)
    return new is not None


def _attribute(module: nn.Module, name: str, value: Any) -> None:
    tracer = tracer_here()
    if tracer is not None and tracer.recording:
        tracer.refuse(f"sets the attribute {name!r}")
    _write(module, name, value)


def _module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tracer = tracer_here()
    if tracer is None:
        return _call(module, *args, **kwargs)
    if _call_of(type(module)) is not nn.Module.__call__:
        tracer.refuse(f"calls a {type(module).__name__}, which defines its own __call__")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _call(module, *args, **kwargs)

    return tracer.call_module(module, forward, args, kwargs)


def _module_init(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    tracer = tracer_here()
    if tracer is not None and tracer.recording:
        tracer.reads.apart.made(module)
    _init(module, *args, **kwargs)


def _call_of(cls: type[nn.Module]) -> Any:
    """The ``__call__`` of a class; that which torch puts on graph modules explains errors."""
    if issubclass(cls, fx.GraphModule):
        of_users = (base for base in cls.__mro__ if "_wrapped_call" not in vars(base))
        return next(vars(base)["__call__"] for base in of_users if "__call__" in vars(base))
    return cls.__call__


def _function_call(cls: type, *args: Any, **kwargs: Any) -> Any:
    tracer = tracer_here()
    if tracer is not None:
        tracer.refuse(f"calls the autograd.Function {cls.__name__}")
    return autograd_apply(cls)(*args, **kwargs)


@contextlib.contextmanager
def keeping_random_state(tracer: Any) -> Iterator[None]:
    """Puts random numbers back that the traced code drew, and has ``tracer`` refuse it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        kind, keys, *rest = np.random.get_state()
        before_kind, before_keys, *before_rest = states[1]
        same = (
            states[0] == random.getstate()
            and (kind, rest) == (before_kind, before_rest)
            and np.array_equal(keys, before_keys)
            and torch.equal(states[2], torch.get_rng_state())
        )
        if not same:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            tracer.note_refusal(DRAWS)


class RefuseEffects(TorchDispatchMode):
    """Real operations at trace time: results would be constants, effects would happen once."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._tracer.recording:
            self._tracer.refuse(f"runs {func} on its own tensors")
        return func(*args, **(kwargs or {}))


CONTEXT = (
    "no_grad or enable_grad", "inference_mode", "autocast", "autocast",
    "a checkpoint or saved-tensor hooks",
)  # fmt: skip
"""What surrounds an operation and is lost in a graph."""


def context() -> tuple[bool, ...]:
    """What surrounds an operation now, in the order of its names."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(False) is None,
    )
