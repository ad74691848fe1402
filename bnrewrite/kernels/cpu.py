"""Kernels for CPU tensors: those in C where they are built and take the arguments, else ATen's.

BNREWRITE_KERNELS=aten leaves those in C out.
"""

import functools
from collections.abc import Callable
from typing import Any

from bnrewrite.kernels import aten, native
from bnrewrite.kernels.epilogue import (
    normalize_keep_sum_with,
    normalize_two_backward_reduce_with,
    normalize_two_backward_with,
    normalize_two_with,
)


def _first_of(kernel: Callable[..., Any], others: Callable[..., Any]) -> Callable[..., Any]:
    """What ``kernel`` gives, or ``others`` where it gives None."""

    @functools.wraps(others)
    def either(*args: Any) -> Any:
        result = kernel(*args)
        return others(*args) if result is None else result

    return either


moments = _first_of(native.moments, aten.moments)
normalize = _first_of(native.normalize, aten.normalize)
normalize_keep_sum = normalize_keep_sum_with(normalize)
normalize_two = normalize_two_with(normalize)
normalize_backward_reduce = _first_of(
    native.normalize_backward_reduce, aten.normalize_backward_reduce
)
activation_backward_reduce = _first_of(
    native.activation_backward_reduce, aten.activation_backward_reduce
)
normalize_backward = _first_of(native.normalize_backward, aten.normalize_backward)
normalize_two_backward_reduce = normalize_two_backward_reduce_with(normalize_backward_reduce)
normalize_two_backward = normalize_two_backward_with(normalize_backward)
