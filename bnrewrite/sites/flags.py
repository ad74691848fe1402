"""What decides, of each site and owner, about what it communicates: a call compares flags alone."""

from collections.abc import Iterable
from typing import Any

LEFT = "_bnrewrite_left"
"""Attribute of an owner whose own forward runs in place of a graph with shared collectives."""

GRAPH = "_bnrewrite_graph"
"""Attribute of an owner whose graph is not the first: the number of those that it had before."""

Flags = tuple[int, ...]
"""A number for each member: 1 if it trains, 2 more if it has left its graph, 4 for each before."""


def flags_of(members: Iterable[Any]) -> Flags:
    """The flags of sites and owners, in order."""
    return tuple(
        bool(member.training)
        + 2 * member.__dict__.get(LEFT, False)
        + 4 * member.__dict__.get(GRAPH, 0)
        for member in members
    )
