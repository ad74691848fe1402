"""Keeps back what torch and onnxscript log while an export checks their results itself.

What is changed belongs to all threads, so one export at a time may do this.
"""

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def quiet(*names: str, level: int) -> Iterator[None]:
    """Lets the loggers of these names log from ``level`` on only.

    A logger that was set to less than a warning, as ``TORCH_LOGS`` does, stays as it is.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            if one.level in (logging.NOTSET, *range(logging.WARNING, level)):
                one.setLevel(level)
        yield
    finally:
        for one, before in zip(loggers, levels, strict=True):
            one.setLevel(before)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[io.StringIO]:
    """Collects what this thread prints on ``sys.stderr``; other threads go on printing there.

    ``torch.export`` prints the graph it has so far when it fails, and asks no setting or logger.
    """
    kept = _ThreadText(sys.stderr)
    with contextlib.redirect_stderr(kept):
        yield kept


class _ThreadText(io.StringIO):
    """Text of the thread that makes it; the others write to ``stream``."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str, /) -> int:
        if threading.get_ident() == self._thread:
            return super().write(text)
        return self._stream.write(text)
