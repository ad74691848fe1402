"""The library with the kernels in C, and the arguments of its functions."""

import ctypes
import functools
import importlib.util
import struct
import warnings
from collections.abc import Callable
from ctypes import c_char_p, c_int
from pathlib import Path

from bnrewrite.settings import kernels_setting

_ABI = 3
"""What ``bnrewrite_abi`` of the library returns that these arguments belong to."""

_INPUT = "qqqqqPq"
"""dtype, N, C, S, whether channels are last, address, threads."""

_MOVING = "dPPPdq"
"""eps, running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite."""

_MEMBERS = {
    "moments": f"{_INPUT}P",
    "statistics": f"qqP{_MOVING}PP",
    "normalize": f"{_INPUT}P{_MOVING}PPPPqddP",
    "backward_reduce": f"{_INPUT}PPPPqddPP",
    "backward": f"{_INPUT}PPPPPP",
}
"""Members of the arguments of the functions in native.c, as ``struct`` calls them."""


class Library:
    """The functions of native.c.

    Each takes the members of its argument, with 0 for NULL, and says whether memory was lacking. To
    ctypes they are one argument, since it takes longer for each than the struct module.
    """

    def __init__(self, path: str) -> None:
        found = ctypes.CDLL(path)
        found.bnrewrite_abi.restype = c_int
        self.abi = found.bnrewrite_abi()
        self.moments = _function(found, "moments")
        self.statistics = _function(found, "statistics")
        self.normalize = _function(found, "normalize")
        self.backward_reduce = _function(found, "backward_reduce")
        self.backward = _function(found, "backward")


def _function(found: ctypes.CDLL, name: str) -> Callable[..., int]:
    function = getattr(found, f"bnrewrite_{name}")
    function.argtypes = (c_char_p,)
    function.restype = c_int
    pack = struct.Struct(_MEMBERS[name]).pack
    return lambda *members: function(pack(*members))


def library() -> Library | None:
    """The library with the kernels; None for the reason that :func:`whence` gives."""
    return _loaded()[0]


def whence() -> str:
    """Which kernels CPU tensors use and, if they are not those in C, why."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[Library | None, str]:
    if kernels_setting() == "aten":
        return None, "ATen kernels: BNREWRITE_KERNELS=aten disables the C kernels"
    spec = importlib.util.find_spec(f"{__package__}._library")
    if spec is None or spec.origin is None:
        return None, (
            "ATen kernels: the C kernels were not built; reinstall bnrewrite with a C compiler "
            "(gcc)"
        )
    path = Path(spec.origin)
    again = "reinstall bnrewrite"
    if any(source.stat().st_mtime > path.stat().st_mtime for source in path.parent.glob("*.[ch]")):
        warnings.warn(
            f"{path.name} is older than its sources and is not used. Until you {again}, "
            "BatchNorm on the CPU runs on torch's own kernels, which are slower.",
            stacklevel=2,
        )
        return None, f"ATen kernels: the C kernels are older than their sources; {again}"
    try:
        found = Library(spec.origin)
    except (OSError, AttributeError) as error:
        return None, f"ATen kernels: the C kernels cannot be loaded; {again} ({error})"
    if found.abi != _ABI:
        return None, f"ATen kernels: the C kernels are of another version; {again}"
    return found, "C kernels"
