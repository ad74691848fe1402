"""Keeps back what torch and onnxscript log while an export checks their results itself."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*names: str, level: int) -> Iterator[None]:
    """Lets the loggers of these names log from ``level`` on only.

    A logger that was set to less than a warning, as ``TORCH_LOGS`` does, stays as it is.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [one.level for one in loggers]
    for one in loggers:
        if one.level in (logging.NOTSET, *range(logging.WARNING, level)):
            one.setLevel(level)
    try:
        yield
    finally:
        for one, before in zip(loggers, levels, strict=True):
            one.setLevel(before)
