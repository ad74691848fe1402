"""Graphs of children in place of their calls, instead of tracing through the children.

What a child does was captured with the child, so its graph is copied with other names. Where the
forward of the child could do something else with the arguments of its call than with those that it
was traced with, or its owner with the result, a trace has to tell.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from torch import fx, nn

from bnrewrite.capture.assumptions import Assumptions
from bnrewrite.capture.captured import Captured
from bnrewrite.passes.base import Attribute, Rewrite, joined, where
from bnrewrite.sites.classes import below, original_class
from bnrewrite.sites.floor import is_site, site_state

PlainGraph = Callable[[str], Captured | None]
"""The training graph of the child at a path, before the optimizing passes."""


class _NotSpliced(Exception):  # noqa: N818
    """Only a trace shows what a call does."""


def spliced(
    plain: Captured, owner: nn.Module, name: str, through: Collection[str], graph_of: PlainGraph
) -> Captured | None:
    """``plain`` with the graphs of children in place of their calls; None if only a trace can tell.

    Args:
        plain: a training graph of ``owner`` before the optimizing passes; it stays as it is.
        owner: the module.
        name: its qualified name.
        through: paths of the children.
        graph_of: their graphs.
    """
    splicer = _Splicer(owner, name, through, graph_of)
    splicer.assumptions.add(plain.assumptions, "")
    try:
        result = splicer.add(plain.graph, "", {}, None)
    except _NotSpliced:
        return None
    splicer.graph.output(result).meta.update(plain.graph.output_node().meta)
    return dataclasses.replace(plain, graph=splicer.graph, assumptions=splicer.assumptions)


class _Splicer:
    """A graph that grows."""

    def __init__(
        self, owner: nn.Module, name: str, through: Collection[str], graph_of: PlainGraph
    ) -> None:
        self.graph = fx.Graph()
        self.assumptions = Assumptions()
        self._owner = owner
        self._name = name
        self._through = through
        self._graph_of = graph_of
        self._attributes: dict[str, fx.Node] = {}
        self._path_of: dict[nn.Module, str] = {}

    def add(
        self, graph: fx.Graph, path: str, values: dict[fx.Node, fx.Node], call: fx.Node | None
    ) -> Any:
        """Copies the graph of the module at ``path``.

        Args:
            graph: the graph.
            path: of its owner below the owner of the whole.
            values: what stands for its placeholders; they are copied, too, if it is empty.
            call: the node in whose place it comes, or the one around that with a line of code.

        Returns:
            What the graph gives.
        """
        for node in graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            if node in values:
                continue
            if node.op == "call_module":
                values[node] = self._call(node, joined(path, str(node.target)), path, values, call)
            elif node.op == "get_attr" and "scope" in node.meta:
                # What code reads twice is one node.
                target = joined(path, str(node.target))
                if target not in self._attributes:
                    self._attributes[target] = self._copy(node, target, path, values, call)
                values[node] = self._attributes[target]
            else:
                target = joined(path, str(node.target)) if node.op == "get_attr" else node.target
                values[node] = self._copy(node, target, path, values, call)
        raise AssertionError("a graph ends with its output")

    def _copy(
        self,
        node: fx.Node,
        target: Any,
        path: str,
        values: dict[fx.Node, fx.Node],
        call: fx.Node | None,
    ) -> fx.Node:
        new = self.graph.create_node(node.op, target, type_expr=node.type)
        if node.op == "call_function" and path:

            def renamed(value: Any) -> Any:
                if isinstance(value, fx.Node):
                    return values[value]
                return Attribute(f"{path}.{value.path}") if type(value) is Attribute else value

            new.args = fx.node.map_aggregate(node.args, renamed)
        elif node.args:
            new.args = fx.node.map_arg(node.args, values.__getitem__)
        if node.kwargs:
            new.kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        new.meta.update(node.meta)
        if call is not None and "scope" in node.meta:
            self._place(new, path, call)
        return new

    def _place(self, new: fx.Node, path: str, call: fx.Node) -> None:
        """Notes where a node of a child is now."""
        meta = new.meta
        meta["scope"] = joined(path, meta["scope"])
        if new.op in ("call_module", "call_function") and meta.get("stack_trace") is None:
            # Code of torch's, a Sequential's for one, called it.
            meta["stack_trace"] = call.stack_trace
        site = meta.get("site")
        if site is not None:
            home = joined(path, site.path)
            name = site_state(self._module(home)).name
            meta["site"] = Rewrite(name, self._name, home, site.mode, site.where or where(new))

    def _module(self, path: str) -> nn.Module:
        """The module at ``path``, which a trace would know by its first path."""
        module = below(self._owner, path)
        if module is None or self._path_of.setdefault(module, path) != path:
            raise _NotSpliced
        return module

    def _call(
        self,
        node: fx.Node,
        target: str,
        path: str,
        values: dict[fx.Node, fx.Node],
        call: fx.Node | None,
    ) -> fx.Node:
        """The call of a module as it is, or what the module does."""
        module = self._module(target)
        if target not in self._through:
            return self._copy(node, target, path, values, call)
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        if node.kwargs or not all(isinstance(value, fx.Node) for value in args):
            raise _NotSpliced
        return self._inside(module, target, args, call if node.stack_trace is None else node)

    def _inside(
        self, module: nn.Module, path: str, args: tuple[fx.Node, ...], call: fx.Node | None
    ) -> fx.Node:
        """What the module at ``path`` does with ``args``."""
        self.assumptions.note_inlined(path, module)
        if _is_sequence_of_calls(module) and len(args) == 1:
            self.assumptions.children[path] = tuple(module._modules)
            result = args[0]
            for name in module._modules:
                result = self._next(f"{path}.{name}", path, result, call)
            return result
        captured = self._graph_of(path)
        if captured is None or not _takes(captured, args):
            raise _NotSpliced
        self.assumptions.add(captured.assumptions, path)
        placeholders = captured.graph.find_nodes(op="placeholder")
        result = self.add(captured.graph, path, dict(zip(placeholders, args, strict=True)), call)
        if not isinstance(result, fx.Node) or isinstance(result.target, type):
            # A trace takes containers apart.
            raise _NotSpliced
        return result

    def _next(self, path: str, scope: str, value: fx.Node, call: fx.Node | None) -> fx.Node:
        """One child of a sequence."""
        module = self._module(path)
        if path in self._through:
            return self._inside(module, path, (value,), call)
        new = self.graph.create_node("call_module", path)
        new.args = (value,)
        new.meta["scope"] = scope
        if call is not None and call.stack_trace is not None:
            new.meta["stack_trace"] = call.stack_trace
        return new


def _is_sequence_of_calls(module: nn.Module) -> bool:
    """Whether ``module`` is a sequence without sites, which is captured for nobody else's sake."""
    return original_class(module) is nn.Sequential and not any(map(is_site, module.children()))


def _takes(captured: Captured, args: tuple[fx.Node, ...]) -> bool:
    """Whether a trace with these arguments would give the same graph.

    Not if the code asks for types, or whether an argument or a part of one is None. Whether a
    function call is a site depends on what is normalized, and its name on those before.
    """
    return (
        len(args) == len(captured.arguments) <= captured.num_positional
        and captured.names[: len(args)] == captured.arguments
        and not captured.tensor_arguments
        and not captured.compares_arguments
        and not captured.elements
        and not captured.functional_sites()
    )
