"""The pass ``share_collectives``: independent sites share one collective.

    a = batch_norm(x, ...)                  pending = start_batch_norm([x, y], ...)
    b = batch_norm(y, ...)         ->       a, b = finish_batch_norm(pending, [x, y], ...)

The number of rounds becomes the length of the longest chain of sites, which is the minimum. A site
that can join several rounds joins the last one: its input is kept for backward anyway, and its
result is computed where it is needed. Nodes move only if necessary and if nothing else changes.
"""

import operator
from collections import defaultdict

import torch
from torch import fx

from bnrewrite.ops.shared_batch_norm import FINISH_BATCH_NORM, START_BATCH_NORM
from bnrewrite.passes.base import OwnerGraph, PassReport, Skip
from bnrewrite.passes.effects import Order
from bnrewrite.passes.liveness import without_backward
from bnrewrite.passes.nodes import call_function
from bnrewrite.passes.rounds import Levels, communicates, group_of
from bnrewrite.passes.schedule import independent, reorder


def share_collectives(target: OwnerGraph, report: PassReport) -> None:
    """Merges the collectives of one owner's training graph."""
    sites = [node for node in target.graph.nodes if group_of(node) is not None]
    if not target.training or not sites:
        return
    if not set(independent(list(target.graph.nodes), sites)).intersection(sites):
        # What one site computes another one needs, whatever else connects them.
        report.skipped.extend(_alone(target, node) for node in sites)
        return
    order = Order(target.owner, target.graph)
    levels = Levels.of(order, lambda node: int(communicates(target.owner, node)))
    rounds: dict[tuple[str | None, int], list[fx.Node]] = defaultdict(list)
    for node in sites:
        rounds[group_of(node), levels.latest[node]].append(node)
    shared = [nodes for nodes in rounds.values() if len(nodes) > 1]
    if shared:
        target.flags.update(order.flags)
        unread = without_backward(target.graph, order)
        reorder(target.graph, order.before, shared, lambda node, position: position)
        for nodes in shared:
            for node in nodes:
                if node in unread:
                    _detach_input(target.graph, node, before=nodes[0])
    for nodes in rounds.values():
        if len(nodes) > 1:
            report.rewritten.extend(node.meta["site"] for node in nodes)
            merge(target.graph, nodes)
        else:
            report.skipped.append(_alone(target, nodes[0]))


def _detach_input(graph: fx.Graph, node: fx.Node, *, before: fx.Node) -> None:
    """Keeps the backward that a site shares from giving zeros to what is before the site."""
    with graph.inserting_before(before):
        detached = graph.call_function(torch.detach, (node.args[0],))
    node.update_arg(0, detached)


def _alone(target: OwnerGraph, node: fx.Node) -> Skip:
    site = node.meta["site"]
    reason = "no other site could join its collective"
    return target.skip(site.name, reason, node, site.path)


def merge(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    """Puts two nodes in place of neighboring ``batch_norm`` nodes; returns the first."""
    columns = [list(column) for column in zip(*(node.args for node in nodes), strict=True)]
    inputs, weight, bias, running_mean, running_var, *others, group, skip_nonfinite = columns
    checked = (inputs, weight, bias, running_mean, running_var)
    with graph.inserting_before(nodes[0]):
        pending = call_function(graph, START_BATCH_NORM, (*checked, group))
        # What follows the sites: nothing yet.
        epilogue = [[one] * len(nodes) for one in (None, -1, "identity", 0.0, "new")]
        rest = (*others, group, skip_nonfinite, *epilogue)
        results = call_function(graph, FINISH_BATCH_NORM, (pending, *checked, *rest))
        for new in (pending, results):
            new.meta["stack_trace"] = nodes[0].stack_trace
            new.meta["sites"] = [node.meta["site"] for node in nodes]
        for index, node in enumerate(nodes):
            result = call_function(graph, operator.getitem, (results, index))
            result.meta["stack_trace"] = node.stack_trace
            node.replace_all_uses_with(result)
    for node in nodes:
        graph.erase_node(node)
    return pending
