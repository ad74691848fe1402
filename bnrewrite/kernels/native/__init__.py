"""The CPU kernels in C: which tensors they take, and what a call of each gives.

They are built when the package is installed, if there is a compiler for them. A function returns
None for arguments that its kernel does not take, which :mod:`bnrewrite.kernels.aten` takes all:
float16, other activations, tensors that are not dense or whose layouts differ, parameters of
another precision.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from bnrewrite import reference
from bnrewrite.kernels.native.load import library
from bnrewrite.kernels.statistics import Running, leave_gradients, recomputes

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
"""Numbers of the dtypes in native.c."""

_NAN = float("nan")
"""Stands in native.c for no limit, and for the momentum of a cumulative average."""

_BOUNDS = {
    "identity": (1.0, _NAN),
    "relu": (0.0, _NAN),
    "relu6": (0.0, 6.0),
    "leaky_relu": (None, _NAN),
}
"""Activations that the kernels know: slope below zero, None for the caller's, and largest value."""

_FAR = 1 << 40
"""An address beyond any offset in bytes: a terabyte."""

_VALUES_PER_THREAD = 1 << 15
"""As many values as pay for one more thread; ATen's own number."""


def takes(x: Tensor) -> bool:
    """Whether there are kernels, and they take ``x`` (N, C, *) and what is laid out as it."""
    return library() is not None and _sizes(x) is not None


def moments(x: Tensor) -> Tensor | None:
    """See :func:`bnrewrite.reference.moments`."""
    c, sizes = library(), _sizes(x)
    if c is None or sizes is None:
        return None
    packed = torch.empty(2 * x.size(1) + 1, dtype=torch.float64)
    _check(c.moments(*sizes, x.data_ptr(), _threads(x), packed.data_ptr()))
    return packed


def statistics(
    totals: Tensor, eps: float, acc: torch.dtype, running: Running
) -> tuple[Tensor, Tensor] | None:
    """Mean and rstd, (2, C), and biased variance (C) in ``acc``; moves the running statistics.

    The same bits as :func:`normalize` gets: of the ranks of a group some may need this one.

    Args:
        totals: (2C + 1,), float64, packed sums of all ranks.
        eps: added to the variance.
        acc: float32 or float64.
        running: what is tracked.
    """
    c, C = library(), totals.numel() // 2
    moving = _moving(running, C, acc)
    if c is None or moving is None or not _is_vector(totals, 2 * C + 1, torch.float64):
        return None
    table = torch.empty((3, C), dtype=acc)
    stats, variance = table[:2], table[2]
    _check(
        c.statistics(
            _DTYPES[acc], C, totals.data_ptr(), eps, *map(_address, moving), *_factor(running),
            stats.data_ptr(), variance.data_ptr(),
        )
    )  # fmt: skip
    _note_moved(running, moving)
    return stats, variance


def normalize(
    x: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool = False,
    residual: Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
) -> tuple[Tensor, Tensor] | None:
    """See :func:`bnrewrite.reference.normalize`; updates the running statistics too."""
    c, sizes = library(), _sizes(x)
    if c is None or sizes is None or activation not in _BOUNDS:
        return None
    C, acc = x.size(1), reference.accumulate_dtype(x.dtype)
    running = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
    moving = _moving(running, C, acc)
    weight, bias = _widened(weight, acc), _widened(bias, acc)
    if not (
        moving is not None
        and _is_vector(totals, 2 * C + 1, torch.float64)
        and _is_parameter(weight, C, acc)
        and _is_parameter(bias, C, acc)
        and (residual is None or _is_like(x, residual))
    ):
        return None
    y = torch.empty_like(x)
    stats = torch.empty((2, C), dtype=acc)
    negative, top = _BOUNDS[activation]
    _check(
        c.normalize(
            *sizes, x.data_ptr(), _threads(x), totals.data_ptr(), eps, *map(_address, moving),
            *_factor(running), stats.data_ptr(), _address(weight), _address(bias),
            _address(residual), activation == "identity", slope if negative is None else negative,
            top, y.data_ptr(),
        )
    )  # fmt: skip
    _note_moved(running, moving)
    return y, stats


def _moving(running: Running, C: int, acc: torch.dtype) -> tuple[Tensor | None, ...] | None:
    """Running statistics as a kernel moves them; None if it does not take them."""
    if recomputes():
        return (None, None, None)
    mean, var, tracked = _widened(running[0], acc), _widened(running[1], acc), running[2]
    if (
        _is_parameter(mean, C, acc)
        and _is_parameter(var, C, acc)
        and (mean is None) == (var is None)
        and _is_parameter(tracked, 1, torch.int64)
        # Nobody may write to buffers made in inference mode outside of it, as torch says.
        and (mean is None or not mean.is_inference() or torch.is_inference_mode_enabled())
    ):
        return mean, var, tracked
    return None


def _factor(running: Running) -> tuple[float, bool]:
    """Momentum, or what stands for a cumulative average, and ``skip_nonfinite``."""
    return _NAN if running[3] is None else running[3], running[4]


def _note_moved(running: Running, moving: tuple[Tensor | None, ...]) -> None:
    """Tells autograd of the writes; where a kernel has moved a wider copy, narrows it."""
    written = []
    for held, moved in zip(running, moving, strict=False):
        if held is moved and moved is not None:
            written.append(moved)
        elif isinstance(held, Tensor) and moved is not None:
            held.copy_(moved)
    increment_version(written)


def normalize_backward_reduce(grad: Tensor, x: Tensor, stats: Tensor) -> Tensor | None:
    """See :func:`bnrewrite.reference.normalize_backward_reduce`."""
    return _reduce(grad, x, stats, None, None, "identity", 0.0)


def activation_backward_reduce(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str,
    slope: float,
    write: bool,
) -> tuple[Tensor, Tensor] | None:
    """See :func:`bnrewrite.reference.activation_backward_reduce`; from the result alone."""
    if activation not in _BOUNDS or activation == "identity" or kept is None or not write:
        return None
    if not takes(x) or not _is_like(x, kept):
        return None
    inner = torch.empty_like(x)
    sums = _reduce(grad, x, stats, kept, inner, activation, slope)
    return None if sums is None else (sums, inner)


def _reduce(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    result: Tensor | None,
    inner: Tensor | None,
    activation: str,
    slope: float,
) -> Tensor | None:
    c, sizes = library(), _sizes(x)
    if c is None or sizes is None or not (_is_like(x, grad) and _are_statistics(stats, x)):
        return None
    num = stats.numel()
    sums = torch.empty(num, dtype=torch.float64)
    gradients = torch.empty(num, dtype=stats.dtype)
    negative, top = _BOUNDS[activation]
    _check(
        c.backward_reduce(
            *sizes, x.data_ptr(), _threads(x), grad.data_ptr(), stats.data_ptr(),
            _address(result), _address(inner), activation == "leaky_relu",
            slope if negative is None else negative, top, sums.data_ptr(), gradients.data_ptr(),
        )
    )  # fmt: skip
    leave_gradients(sums, gradients)
    return sums


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    activation: str = "identity",
    slope: float = 0.0,
) -> Tensor | None:
    """See :func:`bnrewrite.reference.normalize_backward`; without an activation."""
    c, sizes = library(), _sizes(x)
    if c is None or sizes is None or activation != "identity":
        return None
    C = x.size(1)
    weight = _widened(weight, stats.dtype)
    if not (
        _is_like(x, grad)
        and _are_statistics(stats, x)
        and _is_parameter(weight, C, stats.dtype)
        and _is_vector(sums, 2 * C, torch.float64)
        and totals.dtype == torch.float64
        and totals.is_cpu
        and totals.numel()
    ):
        return None
    dx = torch.empty_like(x)
    _check(
        c.backward(
            *sizes, x.data_ptr(), _threads(x), grad.data_ptr(), stats.data_ptr(),
            totals.data_ptr(), _address(weight), sums.data_ptr(), dx.data_ptr(),
        )
    )  # fmt: skip
    return dx


def _sizes(x: Tensor) -> tuple[int, int, int, int, bool] | None:
    """dtype, N, C, S and whether channels are last, for native.c; None if it does not take x."""
    dtype, values = _DTYPES.get(x.dtype), x.numel()
    if dtype is None or values == 0 or not _is_memory(x):
        return None
    N, C = x.size(0), x.size(1)
    S = values // (N * C)
    if x.is_contiguous():
        # One channel is one row, and single positions lie as channels-last ones do.
        return (dtype, 1, 1, values, False) if C == 1 else (dtype, N, C, S, S == 1)
    dims = x.dim()
    if (dims == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        dims == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    ):
        return dtype, N, C, S, True
    return None


def _is_like(x: Tensor, other: Tensor) -> bool:
    """Whether ``other`` has a value for each of ``x``, at the same place."""
    return (
        other.dtype is x.dtype
        and other.shape == x.shape
        and other.stride() == x.stride()
        and _is_memory(other)
    )


def _widened(vector: Tensor | None, acc: torch.dtype) -> Tensor | None:
    """A vector as kernels take it: dense, and of less precision in ``acc``, which holds it all."""
    if vector is None or (vector.dtype is acc and vector.is_contiguous()):
        return vector
    if vector.dtype in (torch.float16, torch.bfloat16):
        vector = vector.to(acc)
    return vector.contiguous()


def _is_vector(tensor: Tensor, size: int, dtype: torch.dtype) -> bool:
    """Whether a vector that phases hand on is one."""
    return (
        tensor.dtype is dtype
        and tensor.numel() == size
        and tensor.is_contiguous()
        and tensor.is_cpu
    )


def _is_parameter(tensor: Tensor | None, size: int, dtype: torch.dtype) -> bool:
    """Whether a vector of the caller's, or None, is one that kernels take."""
    return tensor is None or (_is_vector(tensor, size, dtype) and _is_memory(tensor))


def _is_memory(tensor: Tensor) -> bool:
    """Whether the values of a tensor lie at its address: not if it is a negative view or freed."""
    return (
        tensor.is_cpu
        and not tensor.is_neg()
        # What is freed is at its offset in no memory. To ask for the storage takes longer.
        and (tensor.data_ptr() >= _FAR or tensor.untyped_storage().nbytes() > 0)
    )


def _are_statistics(stats: Tensor, x: Tensor) -> bool:
    return _is_vector(stats, 2 * x.size(1), reference.accumulate_dtype(x.dtype))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _threads(x: Tensor) -> int:
    affordable = x.numel() // _VALUES_PER_THREAD
    return 1 if affordable < 2 else min(torch.get_num_threads(), affordable)


def _check(status: int) -> None:
    if status:
        raise MemoryError("there is no memory for the statistics of a BatchNorm")
