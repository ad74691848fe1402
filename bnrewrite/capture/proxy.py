"""The proxies of captured forwards."""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.graph import inplace_methods


class Proxy(fx.Proxy):
    """A proxy on which ``a += b`` is recorded as the change in place that it is.

    fx records ``a = a + b``, after which other names of the same tensor would keep the old values.
    """


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Proxy, Any], fx.Proxy]:
    def method(self: Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in inplace_methods:
    if _name != "setitem":
        setattr(Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))
