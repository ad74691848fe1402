"""Which nodes of a graph a backward may come to."""

from torch import fx

from bnrewrite.passes.effects import OUTSIDE, SITES, STATE, Order


def without_backward(graph: fx.Graph, order: Order) -> set[fx.Node]:
    """Nodes whose results nobody reads, or only without gradients.

    Args:
        graph: of a training forward.
        order: of the graph.
    """
    live: set[fx.Node] = set()
    # Memory, by its names in ``order``, that a live node reads.
    read: set[object] = set()
    for node in reversed(graph.nodes):
        writes = frozenset() if node.target in SITES else order.writes[node]
        if (
            node.op == "output"
            or not read.isdisjoint(writes)
            or not writes.isdisjoint((OUTSIDE, STATE))
            or any(user in live and not _detaches(user) for user in node.users)
        ):
            live.add(node)
            read.update(map(order.memory.of, node.all_input_nodes))
    return set(graph.nodes) - live


def _detaches(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in ("detach", "detach_")
