"""From a plain module to an ``ExportedProgram`` whose BatchNorm calls are checked and lowered."""

import dataclasses
import logging
import os
import re
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bnrewrite.errors import ExportError
from bnrewrite.export.arguments import Example
from bnrewrite.export.batch_statistics import lower_batch_statistics
from bnrewrite.export.dynamic import Axes, torch_shapes
from bnrewrite.export.evaluate import output_leaves
from bnrewrite.export.quiet import quiet, quiet_stderr
from bnrewrite.naming import ITSELF

log = logging.getLogger(__name__)

PREFIX = "model."
"""In front of the names of parameters and buffers, because the adapter holds the model."""

_SHAPES_LOGGER = "torch.fx.experimental.symbolic_shapes"

_BATCH_NORM = torch.ops.aten.batch_norm.default


class Adapter(nn.Module):
    """The model as a function from its input tensors to its output tensors."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self._example = example

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Calls the model with ``tensors`` in their places."""
        args, kwargs = self._example.rebuild(tensors)
        return tuple(output_leaves(self.model(*args, **kwargs)))


@dataclasses.dataclass(frozen=True)
class Traced:
    """A program with what was found out about its BatchNorm calls.

    Attributes:
        program: the program; no BatchNorm on activations computes batch statistics in it.
        num_batch_stats: calls that computed batch statistics and became primitive operations.
    """

    program: ExportedProgram
    num_batch_stats: int


def trace(model: nn.Module, example: Example, axes: Axes) -> Traced:
    """Traces a plain module in eval mode and checks its BatchNorm calls.

    Raises:
        ExportError: ``torch.export`` fails, or a BatchNorm call cannot be exported.
    """
    program = _export(Adapter(model, example), example, axes)
    tensors = _tensors_by_node(program)
    nodes = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and node.target is _BATCH_NORM
    ]
    activations = _depends_on_inputs(program)
    num_batch_stats = 0
    for node in nodes:
        _input, _weight, _bias, mean, var, training = node.args[:6]
        if not training:
            _check_running(node, mean, var, tensors)
            continue
        if mean is not None:
            raise ExportError(
                f"{_site(node)}: F.batch_norm is called in eval mode with training=True and "
                "running statistics, so evaluation would change them. Pass "
                "training=self.training, or trace the model after model.eval()."
            )
        lower_batch_statistics(program.graph, node)
        num_batch_stats += node in activations
    program.graph_module.recompile()
    return Traced(program, num_batch_stats)


def _export(adapter: Adapter, example: Example, axes: Axes) -> ExportedProgram:
    # What strict tracing notes at its inputs, it would find there the next time.
    tensors = tuple(tensor.detach() for tensor in example.tensors)
    shapes = {"tensors": tuple(torch_shapes(axes))} if any(axes) else None
    # Without it, an example with a batch of one would fix the batch.
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)
    # It logs errors of its own before it raises, which is reported below.
    loggers = "torch.export", "torch._guards", "torch._dynamo", _SHAPES_LOGGER
    hushed = quiet(*loggers, level=logging.CRITICAL)
    with warnings.catch_warnings(), torch.no_grad(), oblivious, hushed:
        # The model's own warnings were shown when it ran on the example.
        warnings.simplefilter("ignore")
        failures: list[Exception] = []
        # Strict tracing reads the code of the model: slower, and other models pass it. It also
        # leaves a size dynamic that the code converts to an int, which fixes it otherwise.
        for strict in (False, True):
            with quiet_stderr() as printed:
                try:
                    return torch.export.export(
                        adapter, tensors, dynamic_shapes=shapes, strict=strict
                    )
                except Exception as error:
                    text = printed.getvalue()
                    log.debug("torch.export with strict=%s fails: %s\n%s", strict, error, text)
                    failures.append(error)
    raise ExportError(_failure(failures[0], example, axes)) from failures[0]


def _is_about_shapes(error: Exception) -> bool:
    return "Constraints violated" in str(error) or "onstraintViolation" in type(error).__name__


def _failure(error: Exception, example: Example, axes: Axes) -> str:
    text = str(error).strip().split("\n\n", 1)[0]
    if any(axes):
        asked = [
            f"axis {axis} of {name!r}"
            for name, one in zip(example.names, axes, strict=True)
            for axis in one
        ]
        blamed = [
            f"axis {axis} of {example.names[int(index)]!r}"
            for index, axis in re.findall(
                r"tensors'?\]?\[(\d+)\][^\n]*?\.size\(\)\[(\d+)\]", str(error)
            )
        ]
        if blamed or _is_about_shapes(error):
            which = " and ".join(dict.fromkeys(blamed or asked))
            return (
                f"{which} cannot be dynamic: the model fixes it, or ties it to another axis. "
                f"Leave it out of dynamic_shapes. torch.export says: {text}"
            )
    return (
        f"{_line(error)}torch.export cannot trace the model in eval mode: "
        f"{type(error).__name__}: {text}. "
        "Remove the operation, or the control flow that depends on values, from its forward."
    )


def _line(error: Exception) -> str:
    """File and line of the model's own code where tracing failed; "" if it is all torch's."""
    skipped = f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}", "<"
    found, inside = "", False
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_filename.startswith(skipped):
            inside = False
            continue
        # torch calls other packages as well; the model's code starts with a module's method.
        inside = inside or isinstance(frame.f_locals.get("".join(code.co_varnames[:1])), nn.Module)
        if inside:
            found = f"{code.co_filename}:{line}: "
    return found


def _tensors_by_node(program: ExportedProgram) -> dict[str, tuple[str, Tensor]]:
    """Qualified name and value of the parameters and buffers, by the name of their node."""
    found: dict[str, tuple[str, Tensor]] = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is None or spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            continue
        values: dict[str, Any] = (
            program.state_dict if spec.persistent is not False else program.constants
        )
        found[spec.arg.name] = (spec.target.removeprefix(PREFIX), values[spec.target])
    return found


def _depends_on_inputs(program: ExportedProgram) -> set[fx.Node]:
    inputs = set(program.graph_signature.user_inputs)
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in inputs or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _check_running(
    node: fx.Node, mean: Any, var: Any, tensors: dict[str, tuple[str, Tensor]]
) -> None:
    for kind, source in (("running_mean", mean), ("running_var", var)):
        if not isinstance(source, fx.Node):
            raise ExportError(
                f"{_site(node)}: {kind} is missing, but the layer is in eval mode. "
                "Give it both running statistics or neither."
            )
        name, value = tensors.get(source.name, ("", None))
        if value is None:
            continue
        if not torch.isfinite(value).all():
            raise ExportError(
                f"{name} holds NaN or infinity. Training diverged or the file is damaged. Load an "
                "intact checkpoint."
            )
        if kind == "running_var" and (value < 0).any():
            raise ExportError(
                f"{name} holds negative variances (smallest: {value.min().item():.3g}). "
                "Load an intact checkpoint."
            )


def _site(node: fx.Node) -> str:
    """The module whose forward made the call, and the line."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = str(stack[-1][0]).removeprefix(PREFIX) if stack else ""
    name = ITSELF if name in ("", "model") else name
    frames = [line.strip() for line in (node.stack_trace or "").splitlines()]
    files = [line for line in frames if line.startswith('File "') and "/torch/nn/" not in line]
    if not files:
        return name
    file, number = files[-1][6:].split('", line ', 1)
    return f"{name} ({file}:{number.split(',', 1)[0]})"
