"""Checks of a written model: ``onnx.checker``, and onnxruntime against the user's model."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from bnrewrite.errors import ExportError

# Relative to the scale of the output. Measured in float32: typically 5e-7, worst 2.1e-5, where
# torch itself is 1.2e-5 away from float64.
_RTOL = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-4, torch.float64: 1e-9}

_ROUNDED = 1e-6
"""Of a file in float64 with attributes, such as epsilon, which ONNX holds in float32, 6e-8 off:
each layer may have one."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Allowed difference: ``atol + rtol * scale``, None for the defaults of the dtype.

    Attributes:
        rtol: relative to the scale of the output.
        atol: absolute.
        rounded: whether nodes of the file have attributes in float32.
    """

    rtol: float | None
    atol: float | None
    rounded: bool = False

    def limit(self, dtype: torch.dtype, scale: float) -> float:
        """The largest difference allowed in an output whose largest value is ``scale``."""
        rtol = max(_RTOL[dtype], _ROUNDED if self.rounded else 0.0)
        rtol = rtol if self.rtol is None else self.rtol
        # Outputs that cancel to nothing still carry the rounding of values of order one.
        atol = torch.finfo(dtype).eps if self.atol is None else self.atol
        return atol + rtol * scale


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest absolute difference, and largest difference relative to its output's scale."""

    max_abs: float = 0.0
    max_rel: float = 0.0

    def __or__(self, other: "Difference") -> "Difference":
        return Difference(max(self.max_abs, other.max_abs), max(self.max_rel, other.max_rel))


def check(path: Path) -> None:
    """Runs ``onnx.checker`` with full shape inference.

    Raises:
        ExportError: the file is not a valid model.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(
            f"onnx.checker rejects the exported model: {str(error).strip()}. "
            "Try another opset_version, or fold=False."
        ) from error


def has_onnxruntime() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


class Runtime:
    """The written model in onnxruntime, on the CPU.

    Raises:
        ExportError: onnxruntime cannot load it.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        # Spinning threads would compete with the caller's own between runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} cannot load the exported model: "
                f"{str(error).strip()}. If it lacks the operator for this dtype, pass "
                "verify=False; the model is valid ONNX."
            ) from error

    def run(self, tensors: Sequence[Tensor]) -> list[np.ndarray]:
        """Outputs for the inputs, in order."""
        names = [one.name for one in self._session.get_inputs()]
        feed = {}
        for name, tensor in zip(names, tensors, strict=True):
            try:
                feed[name] = tensor.detach().cpu().contiguous().numpy()
            except TypeError as error:
                raise ExportError(
                    f"the input {name!r} is {tensor.dtype}, which cannot be passed to onnxruntime "
                    "through NumPy. Pass verify=False; the model is valid ONNX."
                ) from error
        try:
            return [np.asarray(one) for one in self._session.run(None, feed)]
        except Exception as error:
            raise ExportError(
                f"onnxruntime fails to run the exported model: {str(error).strip()}. If it or "
                "NumPy does not support a dtype, pass verify=False; the model is valid ONNX."
            ) from error


def compare(
    wanted: Sequence[Tensor], got: Sequence[np.ndarray], names: Sequence[str], tolerance: Tolerance
) -> Difference:
    """The difference between the model's outputs and onnxruntime's.

    Raises:
        ExportError: a shape, dtype or non-finite value differs, or a value by more than allowed.
    """
    if len(wanted) != len(got):
        raise ExportError(
            f"the model has {len(wanted)} outputs, but the ONNX model has {len(got)}."
        )
    total = Difference()
    for index, (name, reference, array) in enumerate(zip(names, wanted, got, strict=True)):
        place = f"output {index} ({name})"
        reference = reference.cpu()
        result = torch.from_numpy(np.array(array))
        if result.shape != reference.shape or result.dtype != reference.dtype:
            raise ExportError(
                f"{place} is {tuple(result.shape)} {result.dtype} in onnxruntime, but "
                f"{tuple(reference.shape)} {reference.dtype} in the model."
            )
        total |= _compare(place, reference, result, tolerance)
    return total


def _compare(place: str, wanted: Tensor, got: Tensor, tolerance: Tolerance) -> Difference:
    if not wanted.is_floating_point():
        differing = int((wanted != got).sum())
        if differing:
            raise ExportError(
                f"{place} differs in {differing} of {wanted.numel()} {wanted.dtype} values."
            )
        return Difference()
    finite = torch.isfinite(wanted)
    special = ~finite
    if not torch.equal(finite, torch.isfinite(got)) or not torch.equal(
        torch.nan_to_num(wanted[special]), torch.nan_to_num(got[special])
    ):
        raise ExportError(
            f"{place} has {int((~torch.isfinite(got)).sum())} NaN or infinite values in "
            f"onnxruntime and {int(special.sum())} in the model, or has them in other places."
        )
    if not finite.any():
        return Difference()
    wanted64, got64 = wanted[finite].double(), got[finite].double()
    scale = float(wanted64.abs().max())
    error = float((wanted64 - got64).abs().max())
    limit = tolerance.limit(wanted.dtype, scale)
    if not error <= limit:
        raise ExportError(
            f"{place} differs from the model by {error:.3g}, more than the allowed {limit:.3g} "
            f"(its values reach {scale:.3g}). If that is rounding, raise rtol or atol. A model "
            "that draws random numbers in eval mode cannot be compared."
        )
    return Difference(error, error / scale if scale else 0.0)
