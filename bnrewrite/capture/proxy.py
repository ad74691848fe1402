"""The proxies of captured forwards."""

import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from torch import fx
from torch.fx.graph import inplace_methods

from bnrewrite.capture.bytecode import decisions
from bnrewrite.capture.frames import asks_for_torch


def asks_for_class(frame: FrameType) -> bool:
    """Whether traced code reads ``__class__`` in ``frame``; functions in C ask for it, too."""
    found = decisions(frame.f_code)
    return found is not None and frame.f_lasti in found.classes and not asks_for_torch(frame)


class _Watched:
    """What Python asks of a value without an operation that could be recorded.

    The answer would be that of the proxy, and be baked in: so the forward is refused where its code
    asks, and whatever torch asks is answered.
    """

    tracer: Any

    # Numbers of numpy leave operations to the other operand, as they do with tensors.
    __array_priority__ = 1000
    __array_ufunc__ = None

    def _refuse(self, what: str) -> None:
        if self.tracer.recording and not asks_for_torch(sys._getframe(2)):
            self.tracer.refuse(what)

    def __hash__(self) -> int:
        self._refuse("looks up a computed value in a set or dict")
        return id(self)

    def __str__(self) -> str:
        return self._text()

    def __repr__(self) -> str:
        return self._text()

    def __format__(self, spec: str) -> str:
        return self._text()

    def _text(self) -> str:
        frame = sys._getframe(2)
        # The text of an assertion is made whether it holds or not.
        asserts = "_assert" in frame.f_code.co_names
        if self.tracer.recording and not asserts and not asks_for_torch(frame):
            self.tracer.refuse("converts a computed value to text")
        return f"{type(self).__name__}({object.__repr__(self)})"

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("converts a computed value to a NumPy array")

    def __array_function__(self, function: Callable[..., Any], *_: Any) -> NoReturn:
        raise TypeError(f"calls {function.__name__} of NumPy on a computed value")

    def __setattr__(self, name: str, value: Any) -> None:
        # That of the proxy would be set, and the tensor never know.
        self._refuse(f"sets {name!r} on a computed value")
        object.__setattr__(self, name, value)

    @property
    def __class__(self) -> type:
        if self.tracer.recording and asks_for_class(sys._getframe(1)):
            self.tracer.refuse("asks for the class of a computed value")
        return type(self)


class Proxy(_Watched, fx.Proxy):
    """A proxy on which ``a += b`` is recorded as the change in place that it is.

    fx records ``a = a + b``, after which other names of the same tensor would keep the old values.
    """

    def __init__(self, node: fx.Node, tracer: Any) -> None:
        self.__dict__.update(node=node, tracer=tracer)

    def __getattr__(self, name: str) -> "Attribute":
        return Attribute(self, name)  # pyright: ignore[reportCallIssue]


class Attribute(_Watched, fx.proxy.Attribute):
    """An attribute of a value, or a method that is about to be called."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        self.__dict__.update(root=root, attr=attr, tracer=root.tracer, _node=None)

    def __getattr__(self, name: str) -> "Attribute":
        return Attribute(self, name)  # pyright: ignore[reportCallIssue]


PROXIES = (Proxy, Attribute)


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], fx.Proxy]:
    def method(self: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in inplace_methods:
    if _name != "setitem":
        setattr(_Watched, f"__{_name}__", _in_place(getattr(operator, _name)))
