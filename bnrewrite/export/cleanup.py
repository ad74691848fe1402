"""The graph without what the exporter invented: computed constants, zero biases, metadata.

Names and values of parameters stay, so equal tensors are not merged, and operations on parameters
are not computed ahead.
"""

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript
import onnxscript.optimizer

from bnrewrite.errors import ExportError
from bnrewrite.export.names import graph_values
from bnrewrite.export.splits import slice_dynamic_splits


def clean(model: ir.Model, named: set[str], *, fold_weights: bool = False) -> None:
    """Cleans the graph in place.

    Args:
        model: as torch's exporter wrote it.
        named: initializers that are parameters and buffers.
        fold_weights: compute operations on parameters ahead too; their names are lost.

    Raises:
        ExportError: onnxscript fails on the graph.
    """

    def should_fold(node: ir.Node) -> bool | None:
        if not fold_weights and any(value and value.name in named for value in node.inputs):
            return False
        return None

    common.InlinePass()(model)
    slice_dynamic_splits(model.graph)
    try:
        onnxscript.optimizer.fold_constants(model, should_fold=should_fold)
    except RuntimeError as error:
        raise ExportError(
            f"onnxscript {onnxscript.__version__} cannot simplify the graph: {error}. Replace the "
            "operation, or try another version of onnxscript."
        ) from error
    common.RemoveUnusedNodesPass()(model)
    common.IdentityEliminationPass()(model)
    for node in list(model.graph):
        _drop_zero_bias(node, named)
        _fix_reshape(node)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    for holder in (model, model.graph, *model.graph, *graph_values(model.graph)):
        holder.metadata_props.clear()
    _name_nodes(model.graph, named)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer or Constant node, None for anything computed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def _drop_zero_bias(node: ir.Node, named: set[str]) -> None:
    """A convolution without bias gets one of zeros from the exporter; this takes it off."""
    if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
        return
    bias = node.inputs[2]
    value = constant(bias)
    if bias is not None and bias.name not in named and value is not None and not value.any():
        node.resize_inputs(2)


def _fix_reshape(node: ir.Node) -> None:
    """A computed shape with one dynamic size becomes a constant with -1 there.

    Reshape(x, Concat(Reshape(Shape(x)[0]), 512))   ->   Reshape(x, [-1, 512])
    """
    if node.op_type != "Reshape" or node.inputs[1] is None:
        return
    concat = node.inputs[1].producer()
    if concat is None or concat.op_type != "Concat":
        return
    sizes: list[int] = []
    for part in concat.inputs:
        value = constant(part)
        if value is not None:
            sizes.extend(int(size) for size in value.reshape(-1))
        elif part is not None and _is_single(part):
            sizes.append(-1)
        else:
            return
    if sizes.count(-1) != 1 or any(size == 0 or size < -1 for size in sizes):
        return
    if sum(constant(part) is None for part in concat.inputs) != 1:
        return
    shape = ir.tensor(np.array(sizes, dtype=np.int64))
    const = ir.Node("", "Constant", [], [ir.AttrTensor("value", shape)])
    const.outputs[0].name = f"{node.outputs[0].name}_shape"
    const.outputs[0].const_value = shape
    const.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    const.outputs[0].shape = ir.Shape([len(sizes)])
    assert node.graph is not None
    node.graph.insert_before(node, const)
    node.replace_input_with(1, const.outputs[0])


def _is_single(value: ir.Value) -> bool:
    """Whether a value is known to hold one element."""
    if value.shape is not None and list(value.shape) == [1]:
        return True
    producer = value.producer()
    if producer is None or producer.op_type not in ("Reshape", "Unsqueeze"):
        return False
    target = constant(producer.inputs[1])
    source = producer.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 0:
        return False
    return producer.op_type == "Unsqueeze" or (target is not None and target.size == 1)


def _name_nodes(graph: ir.Graph, named: set[str]) -> None:
    """Nodes with parameters are called like the module that holds these, others by their type."""
    used: dict[str, int] = {}
    for node in graph:
        owners = [
            str(value.name).rpartition(".")[0]
            for value in node.inputs
            if value is not None and value.name in named
        ]
        name = next(filter(None, owners), "") or node.op_type
        number = used[name] = used.get(name, -1) + 1
        node.name = f"{name}_{number}" if number else name
