"""Which nodes of a graph are independent, and putting them into another order."""

import heapq
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx


def reorder(
    graph: fx.Graph,
    before: dict[fx.Node, set[fx.Node]],
    groups: Iterable[list[fx.Node]],
    rank: Callable[[fx.Node, int], Any],
) -> None:
    """Moves nodes: each after those it must follow, else by ``rank``, each group in one piece.

    Args:
        graph: a graph, changed in place.
        before: for each node those that must run before it.
        groups: nodes that shall become neighbors, in the order of the graph; what runs between
            two of a group must not have to.
        rank: of a node at a position of the graph; among those that may run, the lowest runs first.

    Raises:
        ValueError: there is no such order.
    """
    nodes = list(graph.nodes)
    unit_of = {node: [node] for node in nodes}
    for group in groups:
        unit_of.update(dict.fromkeys(group, group))
    # A group runs at the place of its last member, where all of it can.
    last = {id(unit_of[node]): index for index, node in enumerate(nodes)}
    waits: dict[int, set[int]] = {}
    followers: dict[int, list[list[fx.Node]]] = {}
    for node in nodes:
        unit = unit_of[node]
        earlier = waits.setdefault(id(unit), set())
        for source in before[node]:
            other = unit_of[source]
            if other is not unit and id(other) not in earlier:
                earlier.add(id(other))
                followers.setdefault(id(other), []).append(unit)
    units = {id(unit): unit for unit in unit_of.values()}

    def priority(unit: list[fx.Node]) -> tuple[Any, ...]:
        index = last[id(unit)]
        # The order of the placeholders is that of the arguments.
        if unit[-1].op == "placeholder":
            return 0, index, id(unit)
        return 1, rank(unit[-1], index), index, id(unit)

    ready = [priority(unit) for key, unit in units.items() if not waits[key]]
    heapq.heapify(ready)
    order: list[fx.Node] = []
    while ready:
        key = heapq.heappop(ready)[-1]
        order.extend(units[key])
        for unit in followers.get(key, ()):
            waits[id(unit)].discard(key)
            if not waits[id(unit)]:
                heapq.heappush(ready, priority(unit))
    if len(order) != len(nodes):
        raise ValueError("the nodes of a group depend on each other")
    end = graph.output_node()
    for node in order:
        if node is not end:
            end.prepend(node)


def independent(nodes: list[fx.Node], of: list[fx.Node]) -> list[fx.Node]:
    """Those of ``nodes``, all of a graph, whose values are independent of some node in ``of``.

    Neither needs the other; a node is not independent of itself.
    """
    bit = {node: 1 << index for index, node in enumerate(of)}
    above: dict[fx.Node, int] = {}
    for node in nodes:
        above[node] = bit.get(node, 0)
        for source in node.all_input_nodes:
            above[node] |= above[source]
    below: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        below[node] = bit.get(node, 0)
        for user in node.users:
            below[node] |= below[user]
    everything = (1 << len(of)) - 1
    return [node for node in nodes if above[node] | below[node] != everything]
