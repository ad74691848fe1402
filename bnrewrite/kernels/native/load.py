"""The library with the kernels in C, and the arguments of its functions."""

import ctypes
import functools
import importlib.util
import warnings
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path
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


def library() -> Any:
    """The library with the kernels; None for the reason that :func:`whence` gives."""
    return _loaded()[0]


def whence() -> str:
    """Which kernels CPU tensors get, and if they are not those in C, why."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[Any, str]:
    if kernels_setting() == "aten":
        return None, "of ATen: BNREWRITE_KERNELS leaves out those in C"
    spec = importlib.util.find_spec(f"{__package__}._library")
    if spec is None or spec.origin is None:
        return None, "of ATen: those in C were not built, install again with a C compiler (gcc)"
    path = Path(spec.origin)
    again = "install bnrewrite again"
    if any(source.stat().st_mtime > path.stat().st_mtime for source in path.parent.glob("*.[ch]")):
        warnings.warn(
            f"{path.name} is older than the sources beside it and is not used: {again}, or "
            "BatchNorm on the CPU runs on torch's own kernels, slower.",
            stacklevel=2,
        )
        return None, f"of ATen: those in C are older than their sources, {again}"
    try:
        found = ctypes.CDLL(spec.origin)
        for name, arguments in _SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes = arguments
            function.restype = c_int
    except (OSError, AttributeError) as error:
        return None, f"of ATen: those in C cannot be loaded, {again} ({error})"
    if found.bnrewrite_abi() != _ABI:
        return None, f"of ATen: those in C are of another version, {again}"
    return found, "in C"
