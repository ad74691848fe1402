"""Which GPUs the kernels in Triton run on."""

import functools
import importlib.util
import subprocess
import warnings

import torch

from bnrewrite.settings import kernels_setting

OLDEST = (8, 0)
"""The compute capability of NVIDIA's from which on they are compiled."""


@functools.cache
def runs_triton(device: int) -> bool:
    """Whether the kernels in Triton run on the GPU of this number.

    Warns where they would if Triton found what it needs.
    """
    if _reason(device) is not None:
        return False
    failure = _failure()
    if failure is not None:
        warnings.warn(
            "Triton cannot launch kernels here, so BatchNorm on GPUs runs on torch's own kernels, "
            "which are slower. Triton needs a C compiler (gcc) and the headers of Python. "
            f"{failure}",
            stacklevel=2,
        )
    return failure is None


def whence(device: int) -> str:
    """Which kernels tensors on this GPU use and, if they are not those in Triton, why."""
    reason = _reason(device) or _failure()
    return "Triton kernels" if reason is None else f"ATen kernels: {reason}"


def _reason(device: int) -> str | None:
    """What rules the kernels out on a GPU, if anything does."""
    if kernels_setting() == "aten":
        return "BNREWRITE_KERNELS=aten disables the Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return f"the compute capability is below {'.'.join(map(str, OLDEST))}"
    return None


@functools.cache
def _failure() -> str | None:
    """What keeps Triton from launching anything; None if nothing does.

    It compiles its launcher on each machine, which images without a compiler cannot do.
    """
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except subprocess.CalledProcessError as error:
        # The compiler has written what it lacks to stderr; its command is long.
        return f"Triton's call of {error.cmd[0]} failed with exit status {error.returncode}."
    except Exception as error:  # whatever a driver, a file system or a compiler lacks
        return f"Triton failed with {type(error).__name__}: {error}"
    return None
