"""Refusing what code decides about values by itself: by identity, and by exceptions."""

import contextlib
import operator
import sys
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from bnrewrite.capture.bytecode import Decisions, decisions
from bnrewrite.capture.frames import TRACES, is_ours
from bnrewrite.capture.proxy import PROXIES, Attribute
from bnrewrite.capture.watched import Watch


def _tell(left: Any, right: Any) -> None:
    for value, other in ((left, right), (right, left)):
        if type(value) in PROXIES and value.tracer.recording:
            _refuse_comparison(value.tracer, value, other)


_WATCH = Watch(_tell)
_CODES: list[tuple[FunctionType, CodeType]] = []
"""Functions that run copies of their code, with the code."""


def watch_comparisons(function: FunctionType) -> None:
    """Has ``function`` tell what it compares by identity, within :func:`giving_code_back`."""
    copy = _WATCH.copy(function.__code__)
    if copy is not function.__code__:
        _CODES.append((function, function.__code__))
        function.__code__ = copy


def own_code(function: FunctionType) -> CodeType:
    """The code of ``function``, also while it runs a copy."""
    return _WATCH.original(function.__code__)


@contextlib.contextmanager
def giving_code_back() -> Iterator[None]:
    """Ends what :func:`watch_comparisons` begins."""
    try:
        yield
    finally:
        while _CODES:
            # In this order, so that an interruption in between loses none.
            function, code = _CODES[-1]
            function.__code__ = code
            _CODES.pop()


def _refuse_comparison(tracer: Any, value: Any, other: Any) -> None:
    """Refuses to compare two things that a proxy says are not the same.

    A proxy is never None, and one of what makes the same tensor is another one.
    """
    if other is not None:
        tracer.refuse("compares a computed value by identity")
    if type(value) is not Attribute and value.node.op == "placeholder":
        # Calls with None for an argument run no graph.
        tracer.compared.add(value.node.name)
    elif _may_be_none(tracer, value) and not _is_element(tracer, value):
        tracer.refuse("compares a computed value with None")


def _is_element(tracer: Any, value: Any) -> bool:
    """Whether a value is an element of an argument, which calls without it run no graph for."""
    return type(value) is not Attribute and tracer.takes_for_tensor(value.node)


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
        # Parameters are looked at.
        return False
    if node.target is getattr:
        return _attribute_may_be_none(str(node.args[1]))
    if node.target is operator.getitem:
        return not (_is_slice(node.args[1]) or _is_of_tensors(tracer, node.args[0]))
    home = getattr(node.target, "__module__", None) or ""
    return not home.startswith(("torch", "_operator", "math"))


def _is_slice(index: Any) -> bool:
    """Whether an index makes a part of what is indexed, and not an element of it."""
    return isinstance(index, slice) or (
        isinstance(index, tuple) and any(isinstance(one, slice) or one is ... for one in index)
    )


def _is_of_tensors(tracer: Any, node: Any) -> bool:
    """Whether no element of a value is None: of a tensor, of its shape, of its chunks."""
    if node.op == "call_module":
        return tracer.is_layer(node)
    if node.op == "call_method":
        return hasattr(Tensor, str(node.target))
    if node.op != "call_function":
        return node.op == "get_attr"
    if node.target is getattr:
        return not _attribute_may_be_none(str(node.args[1]))
    if node.target is operator.getitem:
        return _is_of_tensors(tracer, node.args[0])
    home = getattr(node.target, "__module__", None) or ""
    if home == "_operator":
        return any(_is_of_tensors(tracer, one) for one in node.all_input_nodes)
    return home in _OF_TENSORS and node.target is not F.multi_head_attention_forward


_OF_TENSORS = frozenset(("torch", "torch.functional", "torch.nn.functional", "torch._C._nn"))
"""Modules of functions that make tensors, or tuples of them."""


_OPTIONAL = frozenset(("grad", "grad_fn", "names"))
"""Attributes of tensors that may be None."""


def _attribute_may_be_none(name: str) -> bool:
    return name in _OPTIONAL or not hasattr(Tensor, name)


def refuse_caught(tracer: Any) -> None:
    """Has ``tracer`` refuse a forward that computes something where it catches exceptions.

    Nothing that a proxy does raises.
    """
    outer: FrameType | None = sys._getframe(1)
    while outer is not None and outer.f_code.co_name != TRACES:
        frame, outer = outer, outer.f_back
        found = _of_users(frame.f_code)
        if found is not None and any(start <= frame.f_lasti < end for start, end in found.tried):
            tracer.refuse("computes inside code that catches exceptions")


_USERS: dict[int, tuple[CodeType, Decisions | None]] = {}
"""What code of users decides, by the identity of the code; None for that of others."""


def _of_users(code: CodeType) -> Decisions | None:
    """What ``code`` decides, if it is no code of torch or of this package."""
    found = _USERS.get(id(code))
    if found is None:
        decides = None if is_ours(code.co_filename) else decisions(code)
        found = _USERS[id(code)] = (code, decides)
    return found[1]
