"""BatchNorm into the convolution or linear layer before it.

    scale = weight / sqrt(running_var + eps)
    BatchNormalization(Conv(x, w, b))   ->   Conv(x, scale * w, scale * (b - running_mean) + bias)

The new weights are computed in float64 and cast once. A layer that has another reader, a weight
that another node shares, or a weight that would overflow stays as it is.
"""

import logging

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from bnrewrite.export.cleanup import constant
from bnrewrite.export.names import rename, replace_output

log = logging.getLogger(__name__)

_DEFAULT_EPSILON = 1e-5


def fold_batch_norms(model: ir.Model) -> int:
    """Folds what can be folded and returns how many BatchNormalization nodes that were."""
    num_folded = 0
    for node in list(model.graph):
        if node.op_type != "BatchNormalization" or len(node.outputs) != 1:
            continue
        reason = _fold(model.graph, node)
        if reason is None:
            num_folded += 1
        else:
            log.info("kept %s: %s", node.name, reason)
    common.RemoveUnusedNodesPass()(model)
    return num_folded


def _fold(graph: ir.Graph, node: ir.Node) -> str | None:
    """Folds one node; why not, if that is not possible."""
    source = node.inputs[0]
    layer = None if source is None else source.producer()
    if source is None or layer is None or layer.op_type not in _LAYOUTS:
        return "no convolution or linear layer feeds it"
    if len(source.uses()) != 1 or source.is_graph_output():
        return "the output of the layer before it is also used elsewhere"
    weight = layer.inputs[1]
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    for value in (weight, bias):
        if value is not None and not _is_its_own(value):
            return "the weight of the layer before it is computed, shared or an output"
    affine = _affine(node)
    if weight is None or affine is None:
        return "its parameters are computed"
    scale, shift = affine
    scales = _LAYOUTS[layer.op_type](layer, weight, scale)
    if scales is None:
        return f"this form of {layer.op_type} cannot be scaled"
    dtype = _array(weight).dtype
    # What overflows or divides by zero shows as an infinity or NaN, and is checked.
    with np.errstate(all="ignore"):
        # In place: weights may take gigabytes.
        wide = _array(weight).astype(np.float64)
        wide *= scales
        new_weight = wide.astype(dtype)
        del wide
        old_bias = 0.0 if bias is None else _array(bias).astype(np.float64)
        new_bias = (scale * old_bias + shift).astype(dtype)
    if not _is_finite(new_weight) or not _is_finite(new_bias):
        return f"the folded weight overflows {dtype}"
    _replace(graph, node, layer, new_weight, new_bias)
    return None


def _is_its_own(value: ir.Value) -> bool:
    """Whether a value is a constant that one node reads and nobody else."""
    return constant(value) is not None and len(value.uses()) == 1 and not value.is_graph_output()


def _array(value: ir.Value) -> np.ndarray:
    array = constant(value)
    assert array is not None
    return array


def _is_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())


def _affine(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift per channel, float64; None if they are not constants."""
    arrays = [constant(value) for value in node.inputs[1:]]
    if any(array is None for array in arrays):
        return None
    weight, bias, mean, var = (np.asarray(array, dtype=np.float64) for array in arrays)
    attribute = node.attributes.get("epsilon")
    epsilon = _DEFAULT_EPSILON if attribute is None else attribute.as_float()
    with np.errstate(all="ignore"):
        scale = weight / np.sqrt(var + epsilon)
        return scale, bias - mean * scale


def _conv(layer: ir.Node, weight: ir.Value, scale: np.ndarray) -> np.ndarray | None:
    """Weight (out, in / groups, *kernel)."""
    return scale.reshape(-1, *[1] * (_array(weight).ndim - 1))


def _conv_transpose(layer: ir.Node, weight: ir.Value, scale: np.ndarray) -> np.ndarray | None:
    """Weight (in, out / groups, *kernel); channel g * (out / groups) + j belongs to group g."""
    array = _array(weight)
    attribute = layer.attributes.get("group")
    groups = 1 if attribute is None else attribute.as_int()
    per_group = scale.reshape(groups, array.shape[1])
    rows = np.repeat(per_group, array.shape[0] // groups, axis=0)
    return rows.reshape(*rows.shape, *[1] * (array.ndim - 2))


def _gemm(layer: ir.Node, weight: ir.Value, scale: np.ndarray) -> np.ndarray | None:
    """Weight (out, in) with ``transB``, else (in, out)."""
    values = {name: one.value for name, one in layer.attributes.items()}
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    if values.get("alpha", 1.0) != 1.0 or values.get("beta", 1.0) != 1.0:
        return None
    if bias is not None and _array(bias).ndim != 1:
        return None
    return scale[:, None] if values.get("transB", 0) else scale[None, :]


_LAYOUTS = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm}


def _replace(
    graph: ir.Graph, node: ir.Node, layer: ir.Node, weight: np.ndarray, bias: np.ndarray
) -> None:
    weight_value = layer.inputs[1]
    assert weight_value is not None
    weight_name = str(weight_value.name)
    weight_value.const_value = ir.tensor(weight, name=weight_name)
    bias_value = layer.inputs[2] if len(layer.inputs) > 2 else None
    if bias_value is None:
        bias_name = f"{weight_name.removesuffix('.weight')}.bias"
        tensor = ir.tensor(bias, name=bias_name)
        bias_value = ir.Value(
            name=f"{bias_name}_folded",
            type=weight_value.type,
            shape=ir.Shape(bias.shape),
            const_value=tensor,
        )
        graph.register_initializer(bias_value)
        rename(graph, bias_value, bias_name)
        layer.resize_inputs(3)
        layer.replace_input_with(2, bias_value)
    else:
        bias_value.const_value = ir.tensor(bias, name=str(bias_value.name))
        # A Gemm broadcasts its bias, and the one of a BatchNorm differs between channels.
        bias_value.shape = ir.Shape(bias.shape)
    result, merged = node.outputs[0], layer.outputs[0]
    merged.shape = result.shape
    replace_output(graph, result, merged)
    result.replace_all_uses_with(merged)
    graph.remove(node, safe=True)
