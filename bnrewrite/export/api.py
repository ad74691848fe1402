"""``export_onnx``: the eval graph as a verified ONNX file."""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bnrewrite.export import arguments
from bnrewrite.export.dynamic import read_dynamic_shapes
from bnrewrite.export.evaluate import evaluate
from bnrewrite.export.models import check_model, check_packages, check_tensors
from bnrewrite.export.paths import check_path
from bnrewrite.export.plain import unwrap
from bnrewrite.export.report import ExportReport

log = logging.getLogger(__name__)

_LOCK = threading.RLock()
"""Of exports, which change what all threads share: loggers, ``sys.stderr``, settings of torch."""


def export_onnx(
    model: nn.Module,
    args: Tensor | tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    opset_version: int | None = None,
    fold: bool = False,
    verify: bool = True,
    rtol: float | None = None,
    atol: float | None = None,
    external_data: bool | None = None,
) -> ExportReport:
    """Writes what ``model`` computes in eval mode as an ONNX file of standard operators.

    The model may be converted, reverted or plain, in any mode, wrapped in DistributedDataParallel
    or ``torch.compile``; it is left untouched: what its forward changes in modules, containers,
    objects, closures, arrays and tensors is put back. That does not cover parameters whose values
    it changes in place, gradients, classes and globals, and what lies in generators, files and
    objects of libraries. Evaluated BatchNorm layers are BatchNormalization nodes with running
    statistics, and parameters and buffers keep their ``state_dict`` names and values. The file
    appears only when ``onnx.checker`` accepts it and onnxruntime, if installed, gives the outputs
    of the model.

    Args:
        model: any module.
        args: example inputs, a tensor or a tuple; numbers, strings and None in it are fixed.
        path: the file to write; None to get the model in the report.
        kwargs: example inputs by name.
        input_names: names of the inputs; by default those of forward's arguments.
        output_names: names of the outputs; by default ``output``, ``output_0`` and so on, or the
            keys of a dictionary.
        dynamic_shapes: axes that keep their freedom, e.g. ``{"x": {0: "batch"}}``: forward's
            argument names, axes, and the names of the axes (or ``torch.export.Dim``).
        opset_version: version of the operators, 15 to 26; 18 by default.
        fold: compute BatchNorm into the convolution or linear layer before it, where it is legal.
        verify: compare onnxruntime's outputs with the model's on the example, and on a second
            size of each dynamic axis.
        rtol: allowed difference relative to the largest value of an output; by default 1e-4 in
            float32 and 1e-2 in float16.
        atol: allowed absolute difference on top; by default the rounding of values of order one.
        external_data: write the weights to a file of their own beside ``path``; None for when
            they do not fit into one.

    Returns:
        An :class:`ExportReport`; printing it gives the text form.

    Raises:
        TypeError: an argument has the wrong type.
        ExportError: an argument has a value that cannot be met, the model cannot be exported, or
            the result failed a check.
        ImportError: onnx or onnxscript is not installed.

    Exports run one at a time: what another thread asks for waits.

    A failed call leaves an existing file as it was. A successful one replaces it, with the file of
    weights beside it that it names.
    """
    check_model(model)
    check_packages()
    target = check_path(path)
    opset = arguments.check_opset(opset_version)
    arguments.check_flag("fold", fold)
    arguments.check_flag("verify", verify)
    arguments.check_flag("external_data", external_data, optional=True)
    tolerances = arguments.check_tolerance("rtol", rtol), arguments.check_tolerance("atol", atol)
    model = unwrap(model)
    example = arguments.read_example(model, args, kwargs)
    check_tensors(model, dict(zip(example.names, example.tensors, strict=True)), opset)
    axes = read_dynamic_shapes(model, example, dynamic_shapes)
    given_inputs = arguments.check_names("input_names", input_names, len(example.names))
    with _LOCK:
        log.info("running the model in eval mode")
        expected = evaluate(model, example, example.tensors)
        given_outputs = arguments.check_names("output_names", output_names, len(expected.names))
        inputs, outputs = arguments.graph_names(
            model, (given_inputs, example.names), (given_outputs, expected.names)
        )
        # They take a second to import, and errors above need neither.
        from bnrewrite.export.pipeline import Job, run

        job = Job(
            model=model,
            example=example,
            axes=axes,
            expected=expected,
            inputs=inputs,
            outputs=outputs,
            opset=opset,
            fold=fold,
            verify=verify,
            tolerances=tolerances,
            external_data=external_data,
        )
        return run(job, target)
