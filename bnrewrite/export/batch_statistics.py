"""BatchNorm without running statistics, in operations that every runtime has.

    batch_norm(x)   ->   centered = x - mean(x);   y = centered / sqrt(mean(centered^2) + eps)

BatchNormalization with ``training_mode=1`` says the same, but runtimes for GPUs and NPUs refuse it.
Half precision is computed in float32, as torch does.
"""

import torch
from torch import fx

_ATEN = torch.ops.aten


def lower_batch_statistics(graph: fx.Graph, node: fx.Node) -> None:
    """Replaces one ``aten.batch_norm`` call that uses the statistics of its batch."""
    x, weight, bias = node.args[:3]
    eps = node.args[7]
    assert isinstance(x, fx.Node)
    value = x.meta["val"]
    dims = [0, *range(2, value.dim())]
    shape = [1, -1] + [1] * (value.dim() - 2)
    is_half = value.dtype in (torch.float16, torch.bfloat16)

    with graph.inserting_before(node):

        def call(op: torch._ops.OpOverload, *args: object) -> fx.Node:
            return graph.call_function(op, args)  # pyright: ignore[reportArgumentType]

        def accumulated(one: fx.Node) -> fx.Node:
            if one.meta["val"].dtype not in (torch.float16, torch.bfloat16):
                return one
            return graph.call_function(_ATEN._to_copy.default, (one,), {"dtype": torch.float32})

        wide = accumulated(x)
        centered = call(_ATEN.sub.Tensor, wide, call(_ATEN.mean.dim, wide, dims, True))
        squares = call(_ATEN.mul.Tensor, centered, centered)
        var = call(_ATEN.mean.dim, squares, dims, True)
        y = call(
            _ATEN.div.Tensor, centered, call(_ATEN.sqrt.default, call(_ATEN.add.Tensor, var, eps))
        )
        for op, parameter in ((_ATEN.mul.Tensor, weight), (_ATEN.add.Tensor, bias)):
            if isinstance(parameter, fx.Node):
                y = call(op, y, call(_ATEN.view.default, accumulated(parameter), shape))
        if is_half:
            y = graph.call_function(_ATEN._to_copy.default, (y,), {"dtype": value.dtype})
    y.meta.update({key: one for key, one in node.meta.items() if key != "torch_fn"})
    node.replace_all_uses_with(y)
    graph.erase_node(node)
