"""BatchNormalization on activations of lower precision than its parameters, for every runtime.

From opset 15 on ONNX allows the types to differ, and onnxruntime runs it, but other runtimes refuse
to: OpenVINO 2026.4 says "Input element types do not match". With a Cast on either side the node has
one type, and computes what PyTorch does.
"""

import onnx_ir as ir

from bnrewrite.export.cleanup import constant
from bnrewrite.export.names import rename, replace_output


def widen_batch_norms(model: ir.Model, named: set[str]) -> None:
    """Puts casts around BatchNormalization where types differ, in place.

        x -> BatchNormalization   becomes   x -> Cast -> BatchNormalization -> Cast

    Args:
        model: the graph.
        named: initializers that are parameters and buffers, which keep their type.
    """
    for node in list(model.graph):
        if node.op_type != "BatchNormalization" or len(node.inputs) != 5:
            continue
        source, *parameters = node.inputs
        wide = parameters[-1].dtype if parameters[-1] is not None else None
        if source is None or source.dtype in (None, wide) or wide is None:
            continue
        for index, value in enumerate(parameters, 1):
            if value is not None and value.dtype != wide:
                _widen_parameter(model.graph, node, index, wide, keep=value.name in named)
        _widen(model.graph, node, source, wide)


def _widen_parameter(
    graph: ir.Graph, node: ir.Node, index: int, wide: ir.DataType, *, keep: bool
) -> None:
    """Gives a parameter of another type than the running statistics theirs."""
    value = node.inputs[index]
    assert value is not None
    array = constant(value)
    if keep or array is None or len(value.uses()) != 1:
        cast = _cast(f"{node.name}_widen_{index}", value, wide)
        graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])
        return
    # Ones or zeros that the exporter made for a layer without weight or bias.
    value.const_value = ir.tensor(array.astype(wide.numpy()), name=value.name)
    value.type = ir.TensorType(wide)


def _widen(graph: ir.Graph, node: ir.Node, source: ir.Value, wide: ir.DataType) -> None:
    result = node.outputs[0]
    before = _cast(f"{node.name}_widen", source, wide)
    graph.insert_before(node, before)
    node.replace_input_with(0, before.outputs[0])
    narrow = source.dtype
    assert narrow is not None
    after = _cast(f"{node.name}_narrow", result, narrow)
    narrowed, name = after.outputs[0], str(result.name)
    graph.insert_after(node, after)
    for user, index in result.uses():
        if user is not after:
            user.replace_input_with(index, narrowed)
    replace_output(graph, result, narrowed)
    result.type = ir.TensorType(wide)
    rename(graph, narrowed, name)


def _cast(name: str, value: ir.Value, to: ir.DataType) -> ir.Node:
    node = ir.Node("", "Cast", [value], attributes=[ir.AttrInt64("to", to)], name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(to), value.shape
    return node
