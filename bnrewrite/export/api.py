"""``export_onnx``: writes the eval graph as a verified ONNX file."""

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
    """Writes what ``model`` computes in eval mode to an ONNX file of standard operators.

    The model may be converted, reverted or plain, in training or eval mode, and wrapped in
    DistributedDataParallel or ``torch.compile``. It is left untouched: changes that its forward
    makes to modules, containers, objects, closures, arrays and tensors are undone. Not undone are
    in-place changes to parameter values, gradients, classes and globals, and the state of
    generators, files and library objects. Evaluated BatchNorm layers become BatchNormalization
    nodes with running statistics. Parameters and buffers keep their ``state_dict`` names and
    values. The file appears only after ``onnx.checker`` accepts it and, if onnxruntime is
    installed, its outputs match those of the model.

    Args:
        model: any module.
        args: example inputs, a tensor or a tuple. Tensors in lists, tuples and dictionaries become
            one input each; numbers, strings and None become constants.
        path: the file to write; None to get the model in the report.
        kwargs: example inputs by name.
        input_names: names of the inputs; by default the names of forward's arguments, followed by
            the place of a tensor in them, as in ``x_0`` for a list ``x``.
        output_names: names of the outputs; by default ``output``, ``output_0`` and so on, or the
            keys of a dictionary.
        dynamic_shapes: axes whose size stays free, e.g. ``{"x": {0: "batch"}}``: it maps argument
            names of forward to axes, and axes to names (or ``torch.export.Dim``). A list of
            tensors has a list of these, and a dictionary a dictionary.
        opset_version: version of the operators, 15 to 26; 18 by default.
        fold: fold BatchNorm into the convolution or linear layer before it, where that is valid.
        verify: compare onnxruntime's outputs with the model's on the example and on a second
            size of each dynamic axis.
        rtol: allowed difference relative to the largest value of an output; by default 1e-4 in
            float32 and 1e-2 in float16.
        atol: allowed absolute difference, added to that; by default the rounding of values of
            order one.
        external_data: whether to write the weights to a separate file beside ``path``; None to do
            so only if they do not fit into one file with the model.

    Returns:
        An :class:`ExportReport`; print it for the text form.

    Raises:
        TypeError: an argument has the wrong type.
        ExportError: an argument has an invalid value, the model cannot be exported, or the result
            failed a check.
        ImportError: onnx or onnxscript is not installed.

    Exports run one at a time: a call from another thread waits.

    A failed call leaves an existing file as it was. A successful call replaces it, together with
    the weights file that it names beside it.
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
