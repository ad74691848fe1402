"""From an ``ExportedProgram`` to an ONNX model of the opset that was asked for."""

import logging
import warnings

import onnx
import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from bnrewrite.errors import ExportError
from bnrewrite.export.quiet import quiet

_NATIVE = range(18, 27)


def to_onnx(program: ExportedProgram, opset: int) -> ir.Model:
    """The model as torch's exporter writes it, not optimized, at ``opset`` or at 18 if lower.

    Raises:
        ExportError: an operation has no ONNX form.
    """
    try:
        # They warn that an opset needs conversion: what comes out is checked.
        hushed = quiet("torch.onnx", "onnxscript", level=logging.ERROR)
        with warnings.catch_warnings(), hushed, torch.no_grad():
            warnings.simplefilter("ignore")
            converted = torch.onnx.export(
                program, opset_version=max(opset, _NATIVE[0]), optimize=False, verbose=False
            )
    except Exception as error:
        cause = _innermost(error)
        raise ExportError(
            f"torch.onnx cannot convert the model: {type(cause).__name__}: "
            f"{str(cause).splitlines()[0] if str(cause) else cause!r}. Replace the operation "
            "with others, or pass a higher opset_version."
        ) from error
    assert converted is not None
    return converted.model


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def to_opset(model: ir.Model, opset: int) -> ir.Model:
    """``model`` at an older opset than torch's exporter writes.

    Raises:
        ExportError: an operator has no such form.
    """
    try:
        converted = onnx.version_converter.convert_version(ir.to_proto(model), opset)
    except Exception as error:
        text = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        # Behind the file and line of the converter's source.
        reason = text.partition("failed: ")[2] or text
        raise ExportError(
            f"the model cannot be converted to opset {opset}: {reason.rstrip('.')}. "
            f"Pass opset_version={_NATIVE[0]} or higher."
        ) from error
    result = ir.from_proto(converted)
    for node in result.graph.all_nodes():
        # The converter leaves this attribute on reductions, which have it from opset 18 on only.
        node.attributes.pop("noop_with_empty_axes", None)
    return result


def finish(model: ir.Model, opset: int) -> None:
    """Sets the versions and refuses what is not in the standard domain.

    Raises:
        ExportError: another opset came out than was asked for, or a foreign operator.
    """
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            raise ExportError(
                f"the operator {node.domain}::{node.op_type} is not a standard ONNX operator. "
                "Replace the operation that it comes from."
            )
    produced = model.opset_imports.get("", 0)
    if produced != opset:
        raise ExportError(
            f"opset_version {opset} was requested, but the exporter produced opset {produced}. "
            "Pass an opset_version from 18 to 23."
        )
    for domain in [domain for domain in model.opset_imports if domain]:
        del model.opset_imports[domain]
    model.ir_version = ir_version(opset)


def ir_version(opset: int) -> int:
    """The lowest file format that holds ``opset``, but at least 8: older runtimes read it."""
    lowest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return max(8, lowest)
