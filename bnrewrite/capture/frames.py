"""Where traced code is: frames of the stack, and lines of code for messages."""

import os
import sys
from collections.abc import Callable
from types import FrameType

import torch

from bnrewrite.capture.bytecode import type_questions
from bnrewrite.capture.values import is_library


def is_ours(filename: str) -> bool:
    """Whether a file belongs to torch or to this package."""
    return filename.startswith((_TORCH, _HERE)) and not filename.startswith(_DEMO)


def asks_for_torch(frame: FrameType) -> bool:
    """Whether what a frame asks of a value is asked by torch or by this package, demo and all."""
    return frame.f_globals.get("__name__", "").startswith(("torch.", "bnrewrite."))


def is_of_package(frame: FrameType) -> bool:
    """Whether the code of a frame is this package's own, but for the demo."""
    filename = frame.f_code.co_filename
    return filename.startswith(_HERE) and not filename.startswith(_DEMO)


def is_for_traced_code(frame: FrameType | None) -> bool:
    """Whether traced code has the code of ``frame`` run, and not an import or what cleans up."""
    while frame is not None and frame.f_code.co_name != TRACES:
        code = frame.f_code
        if (
            code.co_filename.startswith("<frozen importlib")
            or code.co_name == "__del__"
            or frame.f_globals.get("__name__") in _ASIDE
        ):
            return False
        frame = frame.f_back
    return True


def compares_class(frame: FrameType) -> bool:
    """Whether a class that ``frame`` asks for may be compared: not if it is read an attribute."""
    return not any(
        one.for_attribute and one.offset == frame.f_lasti for one in type_questions(frame.f_code)
    )


TRACES = "_record_graph"
"""Name of the function that calls the traced code."""

_ASIDE = frozenset(("weakref", "linecache", "tokenize"))
"""Modules that clean up, or read code for messages."""

_TORCH = torch.__path__[0] + os.sep
_HERE = __file__.rsplit("capture", 1)[0]
_DEMO = f"{_HERE}demo{os.sep}"


def user_frame() -> FrameType | None:
    """The innermost frame of the traced code; None where none of the user's runs."""
    frame = sys._getframe(1)
    while frame is not None and is_ours(frame.f_code.co_filename):
        if frame.f_code.co_name == TRACES:
            # From here on it is the code that converts the model.
            return None
        frame = frame.f_back
    return frame


def where() -> str:
    """File and line of the traced code, in parentheses, past what it calls of Python's library."""
    frame = outer = user_frame()
    while outer is not None and outer.f_code.co_name != TRACES:
        if not is_library(outer.f_globals.get("__name__")) and not is_ours(
            outer.f_code.co_filename
        ):
            frame = outer
            break
        outer = outer.f_back
    return "" if frame is None else f" ({frame.f_code.co_filename}:{frame.f_lineno})"


def where_of(error: BaseException, forward: Callable) -> str:
    """File and line of the traced code that raised ``error``, else those of ``forward``."""
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if not is_ours(filename) and not filename.startswith("<"):
            found = f" ({filename}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    if not found:
        code = getattr(forward, "__code__", None)
        found = "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"
    return found
