"""Refusing what code decides about values by itself: by identity, by exceptions, by patterns."""

import contextlib
import operator
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

from bnrewrite.capture.bytecode import Decisions, decisions
from bnrewrite.capture.frames import TRACES, is_ours
from bnrewrite.capture.proxy import PROXIES, Attribute


def refuse_decisions(tracer: Any, new: Any) -> None:
    """Has ``tracer`` refuse a forward that decides something about a value that it computes.

    A proxy answers such questions as itself: it is not None, it is no other proxy, nothing that it
    does raises. Looked at are ``new``, a value that was just made, and those in variables of the
    code that runs.
    """
    innermost = True
    outer: FrameType | None = sys._getframe(1)
    while outer is not None and outer.f_code.co_name != TRACES:
        frame, outer = outer, outer.f_back
        code, at = frame.f_code, frame.f_lasti
        _, is_users, found = _USERS.get(id(code)) or _know(code)
        if not is_users:
            continue
        is_innermost, innermost = innermost, False
        if found is None:
            continue
        if any(start <= at < end for start, end in found.tried):
            tracer.refuse("computes where it catches exceptions")
        if is_innermost:
            _refuse_comparison(tracer, new, at in found.none_results, at in found.results)
        if found.none_names or found.names:
            _refuse_in_variables(tracer, frame.f_locals, found)


@contextlib.contextmanager
def restoring_calls() -> Iterator[None]:
    """Ends what :func:`watch_calls` begins."""
    before = sys.gettrace()
    try:
        yield
    finally:
        if sys.gettrace() is not before:
            sys.settrace(before)


def watch_calls(tracer: Any) -> None:
    """Has ``tracer`` look at the variables of code that compares them, line by line.

    Such code may make no value, so that nothing else would notice. Python then tells of every call,
    which costs time, so it is for code that compares variables at all.
    """
    before: Any = sys.gettrace()
    if isinstance(before, _Calls) and before.tracer is tracer:
        return
    sys.settrace(_Calls(tracer, before))


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """Code of torch and of this package that runs meanwhile compares nothing of the user's."""
    calls = sys.gettrace()
    if not isinstance(calls, _Calls):
        yield
        return
    sys.settrace(calls.before)
    try:
        yield
    finally:
        sys.settrace(calls)


class _Calls:
    """What Python tells of calls, on their way to whom it told before, a debugger perhaps."""

    def __init__(self, tracer: Any, before: Any) -> None:
        self.tracer = tracer
        self.before = before

    def __call__(self, frame: FrameType, event: Any, arg: Any) -> Any:
        wants = self.tracer.recording and self._watches(frame)
        if wants:
            self._look(frame, event, arg)
        if self.before is None:
            return self._look if wants else None
        others = self.before(frame, event, arg)
        if sys.gettrace() is not self:
            # A tracer in C puts itself back.
            sys.settrace(self)
        if not wants:
            return others

        def both(frame: FrameType, event: Any, arg: Any) -> Any:
            self._look(frame, event, arg)
            if others is not None:
                others(frame, event, arg)
            return both

        return both

    def _watches(self, frame: FrameType) -> bool:
        """Whether a frame compares its variables, or its result is compared where it is called."""
        found = _of_users(frame.f_code)
        if found is not None and (found.none_names or found.names):
            return True
        caller = None if frame.f_back is None else _of_users(frame.f_back.f_code)
        return caller is not None and caller.calls

    def _look(self, frame: FrameType, event: Any, arg: Any) -> Any:
        if self.tracer.recording:
            found = _of_users(frame.f_code)
            if found is not None:
                _refuse_in_variables(self.tracer, frame.f_locals, found)
            if event == "return" and type(arg) in PROXIES and frame.f_back is not None:
                caller, at = _of_users(frame.f_back.f_code), frame.f_back.f_lasti
                if caller is not None:
                    with_none, with_others = at in caller.none_results, at in caller.results
                    _refuse_comparison(self.tracer, arg, with_none, with_others)
        return self._look


_USERS: dict[int, tuple[CodeType, bool, Decisions | None]] = {}
"""What is known of code, by its identity: itself, whether it is a user's, what that decides."""


def _of_users(code: CodeType) -> Decisions | None:
    """What ``code`` decides, if it is no code of torch or of this package."""
    return (_USERS.get(id(code)) or _know(code))[2]


def _know(code: CodeType) -> tuple[CodeType, bool, Decisions | None]:
    is_users = not is_ours(code.co_filename)
    found = _USERS[id(code)] = (code, is_users, decisions(code) if is_users else None)
    return found


def _refuse_in_variables(tracer: Any, variables: dict[str, Any], found: Decisions) -> None:
    for name in found.none_names | found.names:
        value = variables.get(name)
        if type(value) in PROXIES:
            _refuse_comparison(tracer, value, name in found.none_names, name in found.names)


def _refuse_comparison(tracer: Any, value: Any, with_none: bool, with_others: bool) -> None:
    if with_others:
        tracer.refuse("compares a value that it computes by its identity")
    if with_none and _may_be_none(tracer, value):
        tracer.refuse("compares a value that it computes with None")


def _may_be_none(tracer: Any, value: Any) -> bool:
    """Whether a value may be None: what a call gives, a member of something, a gradient."""
    if type(value) is Attribute and value._node is None:
        return _attribute_may_be_none(value.attr)
    node = value.node
    if node.op == "call_module":
        return not tracer.gives_a_value(node)
    if node.op == "call_method":
        return not hasattr(Tensor, str(node.target))
    if node.op != "call_function":
        # Calls with None for an argument run no graph, and parameters are looked at.
        return False
    if node.target is getattr:
        return _attribute_may_be_none(str(node.args[1]))
    if node.target is operator.getitem:
        return True
    home = getattr(node.target, "__module__", None) or ""
    return not home.startswith(("torch", "_operator", "math"))


_OPTIONAL = frozenset(("grad", "grad_fn", "names"))
"""Attributes of tensors that may be None."""


def _attribute_may_be_none(name: str) -> bool:
    return name in _OPTIONAL or not hasattr(Tensor, name)
