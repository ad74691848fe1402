"""Names: parameters as in the ``state_dict``, inputs, outputs and axes as the user calls them."""

import re
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from bnrewrite.errors import ExportError
from bnrewrite.export.dynamic import Axes, axis_name, root_name
from bnrewrite.export.trace import PREFIX


def restore_names(model: ir.Model) -> set[str]:
    """Gives parameters and buffers their ``state_dict`` names and returns these."""
    graph = model.graph
    found = set()
    for value in list(graph.initializers.values()):
        name = str(value.name)
        if name.startswith(PREFIX):
            rename(graph, value, name.removeprefix(PREFIX))
            found.add(str(value.name))
    return found


def name_batch_norms(model: ir.Model, named: set[str]) -> None:
    """Names the ones and zeros that a BatchNormalization node without weight or bias needs."""
    for node in model.graph:
        if node.op_type != "BatchNormalization" or len(node.inputs) != 5:
            continue
        owner = str(node.inputs[3].name if node.inputs[3] else "").rpartition(".")[0]
        for value, kind in zip(node.inputs[1:3], ("weight", "bias"), strict=True):
            if value is None or value.name in named or not value.is_initializer():
                continue
            if owner and f"{owner}.{kind}" not in named:
                rename(model.graph, value, f"{owner}.{kind}")


def rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Gives ``value`` a name; another value that has it gets a new one."""
    if value.name == name:
        return
    taken = {str(one.name): one for one in graph_values(graph)}
    if name in taken:
        number = 1
        while f"{name}_{number}" in taken:
            number += 1
        _set_name(graph, taken[name], f"{name}_{number}")
    _set_name(graph, value, name)


def _set_name(graph: ir.Graph, value: ir.Value, name: str) -> None:
    initializers = graph.initializers
    before = str(value.name)
    is_initializer = initializers.get(before) is value
    if is_initializer:
        initializers.pop(before)
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    if is_initializer:
        initializers[name] = value


def graph_values(graph: ir.Graph) -> list[ir.Value]:
    """All values of a graph: inputs, initializers and the results of nodes."""
    results = (value for node in graph for value in node.outputs)
    return [*graph.inputs, *graph.initializers.values(), *results]


def replace_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Has the graph return ``new`` wherever it returns ``old``."""
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new


def name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Names the outputs, each a value of its own: not an input, a weight or another output."""
    graph = model.graph
    seen: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    for index, value in enumerate(list(graph.outputs)):
        if value in seen:
            node = ir.Node("", "Identity", [value])
            node.outputs[0].type = value.type
            node.outputs[0].shape = value.shape
            node.outputs[0].name = f"{names[index]}_value"
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
        seen.add(graph.outputs[index])
    for value, name in zip(graph.outputs, names, strict=True):
        rename(graph, value, name)


def name_inputs(model: ir.Model, names: Sequence[str]) -> None:
    """Names the inputs."""
    for value, name in zip(model.graph.inputs, names, strict=True):
        rename(model.graph, value, name)


def name_axes(model: ir.Model, names: Sequence[str], axes: Axes) -> None:
    """Names the dynamic axes as the user did, in every shape of the graph.

    Raises:
        ExportError: one axis has two names, or an axis that was asked for is fixed.
    """
    # The given name of each symbol of torch.export.
    found: dict[str, str] = {}
    for value, name, one in zip(model.graph.inputs, names, axes, strict=True):
        for axis, what in one.items():
            symbol = _symbol(value, axis)
            wanted = axis_name(what)
            if symbol is None:
                if wanted is None:
                    continue
                raise ExportError(
                    f"axis {axis} of {name!r} cannot be dynamic: the model fixes it to "
                    f"{value.shape[axis] if value.shape else '?'}. Leave it out of dynamic_shapes."
                )
            if not symbol.isidentifier():
                # A derived axis, as 4*h is: its name is that of the axis it comes from.
                inner = re.findall(r"[^\W\d]\w*", symbol)
                wanted = root_name(what)
                if len(inner) != 1 or wanted is None or isinstance(what, str):
                    continue
                symbol = inner[0]
            wanted = wanted or found.get(symbol) or f"{name}_axis_{axis}"
            if found.setdefault(symbol, wanted) != wanted:
                raise ExportError(
                    f"axis {axis} of {name!r} is called {wanted!r}, but the model ties it to the "
                    f"axis called {found[symbol]!r}. Give both axes the same name."
                )
    if found:
        pattern = re.compile(r"\b(" + "|".join(map(re.escape, found)) + r")\b")
        for value in graph_values(model.graph):
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(size, pattern, found) for size in value.shape])


def _symbol(value: ir.Value, axis: int) -> str | None:
    size = None if value.shape is None else value.shape[axis]
    return None if size is None or isinstance(size, int) else str(size.value)


def _renamed(size: Any, pattern: re.Pattern[str], names: dict[str, str]) -> Any:
    if isinstance(size, int) or size.value is None:
        return size
    return ir.SymbolicDim(pattern.sub(lambda match: names[match.group()], str(size.value)))
