"""The steps of an export, in order, from checked arguments to the report."""

import dataclasses
import logging
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import Tensor, nn

from bnrewrite.errors import ExportError
from bnrewrite.export import files, names, translate, verify
from bnrewrite.export.arguments import Example
from bnrewrite.export.cleanup import clean
from bnrewrite.export.dynamic import Axes
from bnrewrite.export.evaluate import Outputs
from bnrewrite.export.fold import fold_batch_norms
from bnrewrite.export.mixed import widen_batch_norms
from bnrewrite.export.paths import data_name
from bnrewrite.export.plain import plain_copy
from bnrewrite.export.report import ExportReport, TensorReport
from bnrewrite.export.second import Other, axis_limits, other_examples
from bnrewrite.export.trace import Traced, trace
from bnrewrite.export.untouched import untouched

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """An export that was asked for, its arguments checked.

    Attributes:
        model: the user's model, unwrapped.
        example: example inputs.
        axes: dynamic axes of each input.
        expected: what the model returns for the example in eval mode.
        inputs: names of the inputs in the graph.
        outputs: names of the outputs in the graph.
        opset: version of the operators.
        fold: whether to fold BatchNorm into the layer before it.
        verify: whether to compare with onnxruntime.
        tolerances: ``rtol`` and ``atol``, None for the defaults.
        external_data: whether the weights get a file of their own; None for when they must.
    """

    model: nn.Module
    example: Example
    axes: Axes
    expected: Outputs
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    fold: bool
    verify: bool
    tolerances: tuple[float | None, float | None]
    external_data: bool | None


@dataclasses.dataclass(frozen=True)
class _Verified:
    """Outcome of the comparison with onnxruntime."""

    batch_sizes: tuple[int, ...] = ()
    why_not: str = ""
    difference: verify.Difference | None = None


def run(job: Job, target: Path | None) -> ExportReport:
    """Exports, checks, and puts the file at ``target``.

    Raises:
        ExportError: a step failed.
    """
    log.info("tracing")
    with untouched(job.model):
        # The copy shares tensors and objects of libraries with the model.
        traced = trace(plain_copy(job.model), job.example, job.axes)
    log.info("converting to ONNX")
    model = translate.to_onnx(traced.program, job.opset)
    named = names.restore_names(model)
    clean(model, named, fold_weights=job.fold)
    num_folded = fold_batch_norms(model) if job.fold else 0
    names.name_batch_norms(model, named)
    widen_batch_norms(model, named)
    names.name_inputs(model, job.inputs)
    names.name_outputs(model, job.outputs)
    names.name_axes(model, job.inputs, job.axes)
    if job.opset < model.opset_imports[""]:
        model = translate.to_opset(model, job.opset)
    translate.finish(model, job.opset)
    external = files.uses_external_data(model, job.external_data)
    with files.staged(target) as path:
        log.info("writing and checking")
        files.write(model, path, external=external)
        verify.check(path)
        verified = _verify(job, traced, model, path)
        proto = onnx.load(path) if target is None else None
    counts = num_folded, traced.num_batch_stats
    ranges = _ranges(model, traced)
    return _report(job, model, (target, proto, external), counts, verified, ranges)


def _ranges(model: ir.Model, traced: Traced) -> dict[str, tuple[int, int | None]]:
    """Limits of dynamic axes, by their names in the file."""
    found: dict[str, tuple[int, int | None]] = {}
    for value, limits in zip(model.graph.inputs, axis_limits(traced.program), strict=True):
        shape = _tensor_report(value).shape
        found.update({str(shape[axis]): limit for axis, limit in limits.items()})
    return found


def _verify(job: Job, traced: Traced, model: ir.Model, path: Path) -> _Verified:
    if not job.verify:
        return _Verified(why_not="verify=False")
    # Without onnxruntime too: the report tells the limits of each axis.
    others = other_examples(traced.program, job.model, job.example, job.axes)
    if not verify.has_onnxruntime():
        return _Verified(why_not="onnxruntime is not installed")
    log.info("comparing with the model in onnxruntime")
    runtime = verify.Runtime(path)
    rounded = any(
        attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)
        for node in model.graph.all_nodes()
        for attribute in node.attributes.values()
    )
    tolerance = verify.Tolerance(*job.tolerances, rounded)
    size = _batch_size(job.example.tensors)
    first = Other(f"batch size {size}", job.example.tensors, job.expected)
    total = verify.Difference()
    for one in (first, *others):
        got = runtime.run(one.tensors)
        try:
            total |= verify.compare(one.expected.tensors, got, job.outputs, tolerance)
        except ExportError as error:
            raise ExportError(f"{one.place}: {error}") from None
    sizes = dict.fromkeys([size, *(_batch_size(one.tensors) for one in others)])
    return _Verified(tuple(sizes), difference=total)


def _batch_size(tensors: tuple[Tensor, ...]) -> int:
    return next((tensor.shape[0] for tensor in tensors if tensor.dim()), 1)


def _report(
    job: Job,
    model: ir.Model,
    written: tuple[Path | None, onnx.ModelProto | None, bool],
    counts: tuple[int, int],
    verified: _Verified,
    ranges: dict[str, tuple[int, int | None]],
) -> ExportReport:
    target, proto, external = written
    nodes = [node.op_type for node in model.graph.all_nodes()]
    difference = verified.difference
    return ExportReport(
        path=None if target is None else str(target),
        external_data=data_name(target) if target is not None and external else None,
        opset=job.opset,
        ir_version=model.ir_version,
        num_nodes=len(nodes),
        num_batch_norm=nodes.count("BatchNormalization"),
        num_folded=counts[0],
        num_batch_stats=counts[1],
        verified=verified.batch_sizes,
        unverified=verified.why_not,
        max_abs=None if difference is None else difference.max_abs,
        max_rel=None if difference is None else difference.max_rel,
        inputs=tuple(map(_tensor_report, model.graph.inputs)),
        outputs=tuple(map(_tensor_report, model.graph.outputs)),
        ranges=ranges,
        model=proto,
    )


def _tensor_report(value: ir.Value) -> TensorReport:
    shape = value.shape or ()
    return TensorReport(
        name=str(value.name),
        dtype="?" if value.dtype is None else value.dtype.name.lower(),
        shape=tuple(size if isinstance(size, int) else str(size.value) for size in shape),
    )
