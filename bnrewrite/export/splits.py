"""Splits into pieces of a computed size, which come up where a dynamic axis is split.

torch's exporter writes a sequence of pieces and takes them from it one by one. onnxscript 0.7
fails on it ("Error during constant folding"), and runtimes know sequences less well than slices.
"""

import numpy as np
import onnx_ir as ir
import onnx_ir.tape as tape

from bnrewrite.export.names import replace_output


def slice_dynamic_splits(graph: ir.Graph) -> None:
    """Replaces pieces of a computed size by slices, in place.

    SequenceAt(SplitToSequence(x, size, axis), i)   ->   Slice(x, i * size, (i + 1) * size, axis)
    """
    for node in list(graph):
        if node.op_type != "SplitToSequence" or len(node.inputs) != 2:
            continue
        source, size = node.inputs
        if source is None or size is None or size.shape is None or len(size.shape) != 0:
            continue
        readers = [user for user, _ in node.outputs[0].uses()]
        if (
            any(_position(reader) is None for reader in readers)
            or node.outputs[0].is_graph_output()
        ):
            continue
        axis = node.attributes.get("axis")
        for reader in readers:
            _slice(graph, reader, source, size, 0 if axis is None else axis.as_int())
        graph.remove(node, safe=True)


def _position(reader: ir.Node) -> int | None:
    """Which piece a SequenceAt takes; None for other nodes and for computed positions."""
    if reader.op_type != "SequenceAt" or reader.inputs[1] is None:
        return None
    tensor = ir.convenience.get_const_tensor(reader.inputs[1])
    position = -1 if tensor is None else int(tensor.numpy().reshape(-1)[0])
    return None if position < 0 else position


def _slice(graph: ir.Graph, reader: ir.Node, source: ir.Value, size: ir.Value, axis: int) -> None:
    position = _position(reader)
    assert position is not None
    made = tape.Tape()

    def constant(*values: int) -> ir.Value:
        return made.op("Constant", [], {"value": ir.tensor(np.array(values, dtype=np.int64))})

    step = made.op("Reshape", [size, constant(1)])
    start, end = (made.op("Mul", [step, constant(index)]) for index in (position, position + 1))
    piece = made.op("Slice", [source, start, end, constant(axis)])
    old = reader.outputs[0]
    piece.type, piece.shape = old.type, old.shape
    graph.insert_before(reader, list(made.nodes))
    replace_output(graph, old, piece)
    old.replace_all_uses_with(piece)
    graph.remove(reader, safe=True)
