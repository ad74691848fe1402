"""Has modules tell, for one trace, which of their attributes the traced code reads."""

import builtins
import contextlib
import sys
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

from torch import nn

from bnrewrite.capture.frames import asks_for_torch
from bnrewrite.capture.proxy import PROXIES, asks_for_class
from bnrewrite.capture.values import MISSING
from bnrewrite.sites.tracing import tracer_here

_ask = builtins.isinstance


@contextlib.contextmanager
def noting_reads(modules: dict[nn.Module, str], tracer: Any) -> Iterator[None]:
    """Makes ``modules``, with their paths, tell ``tracer`` which attributes are read.

    Parameters and buffers become proxies, and ``isinstance`` asks the tracer about proxies. What
    ``apart.watch`` is called with are classes of modules that shall tell, too.
    """
    paths = {id(module): path for module, path in modules.items()}
    noted: dict[Any, Any] = {}
    with contextlib.ExitStack() as stack:

        def make(cls: Any) -> None:
            noted[cls] = _noted(cls.__getattribute__, cls.__getattr__, paths, tracer)

        def put(cls: Any) -> None:
            own = vars(cls).get("__getattribute__")
            try:
                cls.__getattribute__ = noted[cls]
            except (TypeError, AttributeError):
                tracer.refuse(f"reads a module whose class cannot change, a {cls.__name__}")
            if own is None:
                stack.callback(delattr, cls, "__getattribute__")
            else:
                stack.callback(setattr, cls, "__getattribute__", own)

        def watch(cls: type[nn.Module]) -> None:
            if cls not in noted:
                make(cls)
                put(cls)

        # All are made before the first is set: a class must not find that of its base.
        for each in (make, put):
            for cls in dict.fromkeys(map(type, modules)):
                each(cls)
        tracer.reads.apart.watch = watch
        stack.callback(setattr, builtins, "isinstance", _ask)
        builtins.isinstance = _is_instance
        yield


def _noted(
    read: Any,
    look_up: Callable[[Any, str], Any],
    paths: dict[int, str],
    tracer: Any,
) -> Any:
    """Reads an attribute; ``look_up`` does where ``read`` finds nothing."""
    assumptions = tracer.assumptions
    reads = tracer.reads

    def getattribute(module: nn.Module, name: str) -> Any:
        if not tracer.recording or tracer.thread != get_ident():
            return read(module, name)
        if name.startswith("__"):
            if name == "__class__" and asks_for_class(sys._getframe(1)):
                return tracer.class_of(module, sys._getframe(1))
            if name == "__dict__" and not asks_for_torch(sys._getframe(1)):
                tracer.refuse("reads the __dict__ of a module")
            return read(module, name)
        reads.see_getter(type(module), name)
        path = paths.get(id(module))
        try:
            value = read(module, name)
        except AttributeError:
            try:
                value = look_up(module, name)
            except AttributeError:
                if path is not None:
                    assumptions.missing.add((path, name))
                else:
                    reads.apart.note(module, name, MISSING)
                raise
            if path is None:
                reads.apart.note(module, name, value)
                return value
            assumptions.note_member(path, module, name)
            with tracer.paused():
                # It searches the parameters of all modules.
                return tracer.getattr(name, value, tracer.parameter_proxies)
        if path is not None:
            assumptions.note(path, module, name, value, reads)
        else:
            reads.apart.note(module, name, value)
        return value

    return getattribute


def _is_instance(value: Any, classes: Any) -> bool:
    if type(value) in PROXIES and value.tracer.recording and not asks_for_torch(sys._getframe(1)):
        return value.tracer.passes_for(value, classes)
    answer = _ask(value, classes)
    if _ask(value, nn.Module):
        tracer = tracer_here()
        if tracer is not None and tracer.recording and not asks_for_torch(sys._getframe(1)):
            tracer.note_instance(value, classes, answer)
    return answer


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``function``, code of fx, which asks ``isinstance`` hundreds of times."""
    asked, builtins.isinstance = builtins.isinstance, _ask
    try:
        return function(*args, **kwargs)
    finally:
        builtins.isinstance = asked
