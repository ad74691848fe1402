"""The library with the kernels in C, and the arguments of its functions."""

import ctypes
import functools
import importlib.util
from ctypes import c_double, c_int, c_int64, c_void_p
from typing import Any

from bnrewrite.settings import kernels_setting

_ABI = 1
"""What ``bnrewrite_abi`` of the library returns that these signatures belong to."""

_SIZES = (c_int, c_int64, c_int64, c_int64, c_int)

_RUNNING = (c_double, c_void_p, c_void_p, c_void_p, c_double, c_int)
"""eps, running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite."""

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "bnrewrite_abi": (),
    "bnrewrite_moments": (*_SIZES, c_void_p, c_void_p, c_int),
    "bnrewrite_statistics": (c_int, c_int64, c_void_p, *_RUNNING, c_void_p, c_void_p),
    "bnrewrite_normalize": (
        *_SIZES, c_void_p, c_void_p, *_RUNNING, *[c_void_p] * 4, c_int, c_double, c_double,
        c_void_p, c_int,
    ),
    "bnrewrite_backward_reduce": (
        *_SIZES, *[c_void_p] * 5, c_int, c_double, c_double, c_void_p, c_int,
    ),
    "bnrewrite_backward": (*_SIZES, *[c_void_p] * 7, c_int),
}  # fmt: skip
"""Arguments of the functions in native.c, each of which returns an int."""


@functools.cache
def library() -> Any:
    """The library with the kernels, or None: it was not built, or BNREWRITE_KERNELS is ``aten``."""
    spec = importlib.util.find_spec(f"{__package__}._library")
    if spec is None or spec.origin is None or kernels_setting() == "aten":
        return None
    try:
        found = ctypes.CDLL(spec.origin)
        for name, arguments in _SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes = arguments
            function.restype = c_int
    except (OSError, AttributeError):
        # Built for another machine, or from other sources.
        return None
    return found if found.bnrewrite_abi() == _ABI else None
