"""Which tracer captures a module now, for the forwards that it runs."""

import threading
from typing import Any


class Tracing:
    """The tracer that captures a module at this moment, or None."""

    tracer: Any = None


def tracer_here() -> Any:
    """The tracer, if it captures in this thread; others go on as ever meanwhile."""
    tracer = Tracing.tracer
    return tracer if tracer is not None and tracer.thread == threading.get_ident() else None
