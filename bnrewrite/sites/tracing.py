"""Which tracer captures a module now, for the forwards that it runs."""

import threading
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves


class Tracing:
    """The tracer that captures a module at this moment, or None."""

    tracer: Any = None


def tracer_here() -> Any:
    """The tracer, if it captures in this thread; others go on as ever meanwhile."""
    tracer = Tracing.tracer
    return tracer if tracer is not None and tracer.thread == threading.get_ident() else None


def are_symbols(args: Any, kwargs: Any) -> bool:
    """Whether ``torch.fx`` records symbols; other tracers set its flag, too, and so do we."""
    return isinstance(args, fx.Proxy) or any(
        isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))
    )
