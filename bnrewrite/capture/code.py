"""The function that a captured graph becomes: it computes the same, with fewer steps of Python."""

from collections.abc import Callable
from typing import Any

from torch import fx

from bnrewrite.groups import active_group
from bnrewrite.ops.library import is_composite, run_composite
from bnrewrite.passes.base import Attribute


def function_of(graph: fx.Graph) -> Callable[..., Any]:
    """The function; its first argument is the owner, to which the attributes of ``graph`` belong.

    A search for a child or buffer of a module takes about as long as a call, and a graph names the
    same ones many times. So the function finds each module once, asks once for each group, and
    calls composites without a dispatch where that would only call them:

        y = torch.ops.bnrewrite.batch_norm.default(x, self.bn.weight, self.bn.bias, ...)

        bn = self.bn
        y = run_composite(torch.ops.bnrewrite.batch_norm.default, x, bn.weight, bn.bias, ...)
    """
    python = _Copy(graph).graph.python_code("self")
    return fx.graph_module._forward_from_src(python.src, python.globals.copy())


class _Copy:
    """A copy of a graph as its code shall be."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = fx.Graph()
        self._modules: dict[str, fx.Node] = {}
        self._groups: dict[tuple[Any, ...], fx.Node] = {}
        copies: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            copies[node] = self._copied(node, copies)

    def _copied(self, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        if node.op == "get_attr":
            return self._read(str(node.target))
        if node.target is active_group:
            # A name and what says whether the site trains: an attribute or a constant.
            question = tuple(map(repr, node.args))
            if question not in self._groups:
                self._groups[question] = self._plain_copy(node, copies)
            return self._groups[question]
        return self._plain_copy(node, copies)

    def _plain_copy(self, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        attributes = _attributes_in((node.args, node.kwargs))
        reads = {path: self._read(path) for path in attributes}
        copy = self.graph.node_copy(node, copies.__getitem__)
        if reads:
            copy.args = _with_reads(copy.args, reads)
            copy.kwargs = _with_reads(copy.kwargs, reads)
        if is_composite(node.target):
            copy.target, copy.args = run_composite, (node.target, *copy.args)
        return copy

    def _read(self, path: str) -> fx.Node:
        """A node that reads the attribute at ``path``."""
        holder, _, name = path.rpartition(".")
        if not holder:
            return self.graph.get_attr(path)
        if holder not in self._modules:
            self._modules[holder] = self._read(holder)
        arguments = (self._modules[holder], name)
        return self.graph.create_node(
            "call_function", getattr, arguments, name=path.replace(".", "_")
        )


def _attributes_in(arguments: Any) -> dict[str, None]:
    found: dict[str, None] = {}
    fx.node.map_aggregate(
        arguments, lambda one: found.setdefault(one.path) if isinstance(one, Attribute) else None
    )
    return found


def _with_reads(arguments: Any, reads: dict[str, fx.Node]) -> Any:
    return fx.node.map_aggregate(
        arguments, lambda one: reads[one.path] if isinstance(one, Attribute) else one
    )
