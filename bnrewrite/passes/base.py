"""What a pass works on and what it reports."""

import dataclasses
import keyword
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from bnrewrite.modes import Mode, ModeTable

UNMATCHED = "no pattern in mode matches it"
"""Reason of a skip that the user asked for."""


@dataclasses.dataclass(frozen=True)
class Skip:
    """Something a pass left as it was: which, why, and where in the user's code.

    ``path`` leads from ``owner`` to the module that ``name`` names, where there is one. Of a module
    without a graph ``owner`` is None.
    """

    name: str
    reason: str
    where: str | None = None
    path: str | None = None
    owner: str | None = ""


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A site that a pass rewrote, or another module.

    Attributes:
        name: qualified name.
        owner: qualified name of the module whose graph contains it; "" is the root.
        path: attribute path of the module below the owner; None for a functional call.
        mode: the mode of the site; None if it is another module than a site.
        where: file and line of the call, where known.
        index: of a functional call among those of its module's forward.
        tensor: path below the owner of a tensor that tells a functional call from others.
    """

    name: str
    owner: str
    path: str | None
    mode: Mode | None
    where: str | None
    index: int = 0
    tensor: str | None = None

    @property
    def is_of_owner(self) -> bool:
        """Whether a functional call is in the owner's own forward, and not in one inlined."""
        return self.name.rpartition(".")[0] == self.owner


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An attribute of the owner, as an argument of the node that reads it.

    Code of a graph spells it out. A site reads eight of them; as nodes of their own they would be
    most of a graph. Parameters are nodes, since reading a parametrized one computes it.

    Attributes:
        path: below the owner.
    """

    path: str

    def __repr__(self) -> str:
        code = "self"
        for name in self.path.split("."):
            plain = name.isidentifier() and not keyword.iskeyword(name)
            code = f"{code}.{name}" if plain else f"getattr({code}, {name!r})"
        return code


def with_attribute_nodes(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` in which every attribute that is read is a node, as fx has it."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in list(copied.nodes):
        with copied.inserting_before(node):

            def as_node(value: Any) -> Any:
                return copied.get_attr(value.path) if isinstance(value, Attribute) else value

            node.args = fx.node.map_aggregate(node.args, as_node)
            node.kwargs = fx.node.map_aggregate(node.kwargs, as_node)
    return copied


@dataclasses.dataclass
class PassReport:
    """What a pass did in one graph, and what it left with a reason."""

    rewritten: list[Rewrite] = dataclasses.field(default_factory=list)
    skipped: list[Skip] = dataclasses.field(default_factory=list)

    def add(self, other: "PassReport") -> None:
        """Adds what the pass did in other graphs."""
        self.rewritten.extend(other.rewritten)
        self.skipped.extend(other.skipped)

    def renamed(self, owner: str, name_of: Callable[[str, str | None, str], str]) -> "PassReport":
        """The same report about another owner with the same graph.

        Args:
            owner: qualified name of the other owner.
            name_of: the name of a site there, from its name, its path and its owner here.
        """
        return PassReport(
            [
                Rewrite(
                    name_of(one.name, one.path, one.owner),
                    owner,
                    one.path,
                    one.mode,
                    one.where,
                    one.index,
                    one.tensor,
                )
                for one in self.rewritten
            ],
            [
                Skip(
                    name_of(one.name, one.path, one.owner or ""),
                    one.reason,
                    one.where,
                    one.path,
                    owner,
                )
                for one in self.skipped
            ],
        )


@dataclasses.dataclass
class OwnerGraph:
    """A graph to rewrite, with what a pass may need to know of where it comes from.

    Attributes:
        name: qualified name of the owner; "" is the root.
        owner: the module whose forward was captured. A pass reads it and leaves it alone.
        graph: the captured graph, rewritten in place.
        training: the mode in which the owner was traced.
        modes: which mode each site gets.
        group: name of the process group of communicating sites.
        keep: patterns of modules that must stay callable units.
        untraced: names of modules with sites that could not be traced by themselves.
        retrace: traces the owner again, and through the children at some paths, and gives the new
            graph with its BatchNorm calls replaced; None if the owner cannot be traced so. It
            returns the paths that it went through.
        flags: attributes that a pass relied on, by path and name, with their values.
        absorbed: modules whose calls became part of other nodes, by path, with their classes.
        tensors: names of placeholders that must be tensors.
    """

    name: str
    owner: nn.Module
    graph: fx.Graph
    training: bool
    modes: ModeTable
    group: str
    keep: tuple[str, ...] = ()
    untraced: tuple[str, ...] = ()
    retrace: Callable[[set[str]], tuple[fx.Graph, set[str]] | None] | None = None
    flags: dict[tuple[str, str], object] = dataclasses.field(default_factory=dict)
    absorbed: dict[str, type] = dataclasses.field(default_factory=dict)
    tensors: set[str] = dataclasses.field(default_factory=set)

    def skip(self, name: str, reason: str, node: fx.Node | None, path: str | None) -> Skip:
        """What a pass reports of something that it leaves; ``node`` and ``path`` say where."""
        return Skip(name, reason, None if node is None else where(node), path, self.name)

    def qualified(self, path: str) -> str:
        """The qualified name of the module at ``path`` below the owner."""
        return joined(self.name, path)

    def keeps(self, path: str) -> bool:
        """Whether the user wants the module at ``path`` below the owner to stay a call."""
        return any(fnmatchcase(self.qualified(path), pattern) for pattern in self.keep)


def joined(*names: str) -> str:
    """A qualified name of parts, of which some may be empty."""
    return ".".join(filter(None, names))


Pass = Callable[[OwnerGraph, PassReport], None]


def where(node: fx.Node) -> str | None:
    """File and line of the user's code that ``node`` comes from."""
    if not node.stack_trace:
        return None
    lines = [line.strip() for line in node.stack_trace.splitlines()]
    for line in reversed(lines):
        if line.startswith('File "'):
            file, number = line[6:].split('", line ', 1)
            return f"{file}:{number.split(',', 1)[0]}"
    return None
