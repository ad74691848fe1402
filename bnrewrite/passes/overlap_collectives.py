"""The pass ``overlap_collectives``: other work runs while the collective of a site is in flight.

    a = batch_norm(x, ...)                  pending = start_batch_norm([x], ...)
    b = conv(y)                    ->       b = conv(y)
    c = relu(a)                             (a,) = finish_batch_norm(pending, [x], ...)
                                            c = relu(a)

A collective is launched as soon as the inputs of its sites are ready. What these inputs need comes
before other work, and the wait comes when nothing else is left to do. If no other work could run
during the collective of a site, the site stays one call.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnrewrite.groups import active_group, place_in
from bnrewrite.ops.batch_norm import BATCH_NORM
from bnrewrite.ops.library import argument
from bnrewrite.ops.shared_batch_norm import FINISH_BATCH_NORM, START_BATCH_NORM
from bnrewrite.passes.base import OwnerGraph, PassReport
from bnrewrite.passes.effects import Order
from bnrewrite.passes.nodes import call_function
from bnrewrite.passes.rounds import Levels, group_of
from bnrewrite.passes.schedule import independent, reorder
from bnrewrite.passes.share_collectives import merge
from bnrewrite.sites.floor import checked_input

_TRIVIAL = (
    operator.getitem, operator.eq, getattr, torch._assert, torch.detach, active_group, place_in,
    checked_input,
)  # fmt: skip


def overlap_collectives(target: OwnerGraph, report: PassReport) -> None:
    """Puts work between the launch and the end of the collectives of one training graph."""
    if not target.training or not _may_gain(target):
        return
    graph = target.graph
    before = list(graph.nodes)
    parts = {merge(graph, [node]): node for node in before if group_of(node) is not None}
    order = Order(target.owner, graph)
    reorder(graph, order.before, (), _rank(order))
    gained = False
    stands_for: dict[fx.Node, fx.Node] = {}
    for start, finish, works in _pairs(graph):
        sites = start.meta["sites"]
        if works:
            gained = True
            report.rewritten.extend(sites)
        else:
            report.skipped.extend(
                target.skip(site.name, "no other work could run meanwhile", start, site.path)
                for site in sites
            )
            if len(sites) == 1:
                stands_for[parts[start]] = _undo(graph, start, finish)
    if gained:
        target.flags.update(order.flags)
        return
    *others, end = before
    for node in others:
        end.prepend(stands_for.get(node, node))


def _may_gain(target: OwnerGraph) -> bool:
    """Whether any work does not depend on a collective that it could hide."""
    nodes = list(target.graph.nodes)
    collectives = [n for n in nodes if group_of(n) is not None or n.target is FINISH_BATCH_NORM]
    return any(map(is_work, independent(nodes, collectives)))


def is_work(node: fx.Node) -> bool:
    """Whether running ``node`` takes the device any time: more than a counter does."""
    if all(source.op == "get_attr" for source in node.all_input_nodes):
        return False
    if node.op == "call_function":
        ours = (BATCH_NORM, START_BATCH_NORM, FINISH_BATCH_NORM)
        return node.target not in (*_TRIVIAL, *ours)
    return node.op in ("call_module", "call_method")


def _rank(order: Order) -> Callable[[fx.Node, int], Any]:
    """Launches first, then what the next launch waits for, then other work, and ends last."""
    levels = Levels.of(order, lambda node: int(node.target is START_BATCH_NORM))
    # For each node the first collective that has to wait for it.
    needed = dict.fromkeys(order.before, levels.total + 1)
    for node in reversed(list(order.before)):
        if node.target is START_BATCH_NORM:
            needed[node] = levels.latest[node]
        for source in order.before[node]:
            needed[source] = min(needed[source], needed[node])

    def rank(node: fx.Node, position: int) -> tuple[int, int, int]:
        if node.target is START_BATCH_NORM:
            return 0, needed[node], position
        return (2 if node.target is FINISH_BATCH_NORM else 1), needed[node], position

    return rank


def _pairs(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node, bool]]:
    """Launches and ends of collectives, and whether any work lies between."""
    nodes = list(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    found = []
    for finish in graph.find_nodes(op="call_function", target=FINISH_BATCH_NORM):
        start = finish.args[0]
        between = nodes[position[start] : position[finish]]
        found.append((start, finish, any(map(is_work, between))))
    return found


def _undo(graph: fx.Graph, start: fx.Node, finish: fx.Node) -> fx.Node:
    """Makes one ``batch_norm`` of a pair with a single site; returns it."""
    names = [one.name for one in BATCH_NORM._schema.arguments]
    # Inputs of several sites are "inputs".
    columns = [argument(finish, {"input": "inputs"}.get(name, name)) for name in names]
    with graph.inserting_before(finish):
        node = call_function(graph, BATCH_NORM, tuple(column[0] for column in columns))
    (result,) = finish.users
    node.meta["stack_trace"] = result.stack_trace
    node.meta["site"] = start.meta["sites"][0]
    result.replace_all_uses_with(node)
    for old in (result, finish, start):
        graph.erase_node(old)
    return node
