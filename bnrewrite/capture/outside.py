"""What traced code reads that belongs to no module: names of functions, answers of torch.

All modules of a process share it.
"""

import dataclasses
import os
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist

from bnrewrite.capture.comparisons import own_code
from bnrewrite.capture.seen import Comparison, Seen
from bnrewrite.capture.values import MISSING


def _autocast() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    return tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)


def _backends() -> tuple[Any, ...]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32,
        torch.backends.mkldnn.enabled,
    )  # fmt: skip


ASKED: dict[str, Callable[[], Any]] = {
    "is_grad_enabled": torch.is_grad_enabled,
    "is_inference_mode_enabled": torch.is_inference_mode_enabled,
    "is_autocast_enabled": _autocast,
    "is_autocast_cpu_enabled": _autocast,
    "is_autocast_available": _autocast,
    "get_autocast_cpu_dtype": _autocast,
    "get_autocast_gpu_dtype": _autocast,
    "is_autocast_cache_enabled": torch.is_autocast_cache_enabled,
    "is_anomaly_enabled": torch.is_anomaly_enabled,
    "get_float32_matmul_precision": torch.get_float32_matmul_precision,
    "backends": _backends,
    "get_autocast_dtype": _autocast,
    "get_default_dtype": torch.get_default_dtype,
    "get_default_device": torch.get_default_device,
    "are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled,
    "get_num_threads": torch.get_num_threads,
    "environ": lambda: dict(os.environ),
    "getenv": lambda: dict(os.environ),
    "is_compiling": torch.compiler.is_compiling,
    "is_exporting": torch.compiler.is_exporting,
    "is_tracing": torch.jit.is_tracing,
    "is_in_onnx_export": torch.onnx.is_in_onnx_export,
    "is_initialized": dist.is_initialized,
    "get_rank": lambda: dist.get_rank() if dist.is_initialized() else None,
    "get_world_size": lambda: dist.get_world_size() if dist.is_initialized() else None,
}
"""What code may ask torch or the system for, by the names of the functions."""

TRACING = frozenset(("is_fx_tracing", "is_fx_symbolic_tracing"))
"""Those with another answer in a trace than in a call."""

COMPILING = frozenset(("is_compiling", "is_exporting", "is_tracing", "is_in_onnx_export"))
"""Those with another answer while a compiler traces."""


@dataclasses.dataclass(frozen=True)
class Outside:
    """What functions named and asked for: the same for all modules of a process.

    Attributes:
        values: by the holder and the name there, what was found. Holders are dictionaries of
            globals and of defaults, classes, functions (their defaults and code) and cells.
        answers: of torch, by the name of the question.
    """

    values: dict[tuple[int, str], Seen] = dataclasses.field(default_factory=dict)
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)
    holders: dict[int, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read."""
        return not (self.values or self.answers)

    def holds(self) -> bool:
        """Whether all of it is still so."""
        return self.values_hold() and all(
            ASKED[name]() == answer for name, answer in self.answers.items()
        )

    def values_hold(self) -> bool:
        """Whether what was found is still there, whatever torch would answer now."""
        now = None
        for (number, name), seen in self.values.items():
            value = read_of(self.holders[number], name)
            # The common case, without a call.
            if value is seen.value and type(seen) is Seen:
                continue
            now = now or Comparison(None)
            if not seen.matches(value, now):
                return False
        return True


def read_of(holder: Any, name: str) -> Any:
    """What a holder, see :class:`Outside`, has under ``name``."""
    if isinstance(holder, dict):
        return holder.get(name, MISSING)
    if isinstance(holder, type):
        return vars(holder).get(name, MISSING)
    if isinstance(holder, FunctionType):
        return own_code(holder) if name == "__code__" else holder.__defaults__
    try:
        return holder.cell_contents
    except ValueError:
        return MISSING


def write_to(holder: Any, name: str, value: Any) -> None:
    """Gives a holder ``value`` under ``name``."""
    if isinstance(holder, dict):
        holder[name] = value
    elif isinstance(holder, type) and value is MISSING:
        delattr(holder, name)
    elif isinstance(holder, type):
        setattr(holder, name, value)
    elif isinstance(holder, FunctionType) and name == "__code__":
        holder.__code__ = value
    elif isinstance(holder, FunctionType):
        holder.__defaults__ = value
    else:
        holder.cell_contents = value
