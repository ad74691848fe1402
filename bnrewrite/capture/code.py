"""The function that a captured graph becomes: it computes the same, with fewer steps of Python."""

import keyword
import operator
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.graph import inplace_methods

from bnrewrite.groups import active_group
from bnrewrite.ops.batch_norm_act import BATCH_NORM_ACT
from bnrewrite.ops.epilogue import addend
from bnrewrite.ops.library import argument, is_composite, run_composite
from bnrewrite.ops.shared_batch_norm import FINISH_BATCH_NORM
from bnrewrite.passes.base import Attribute
from bnrewrite.passes.epilogues import may_be_number
from bnrewrite.passes.overlap_backward import convolve


def function_of(graph: fx.Graph) -> Callable[..., Any]:
    """The function; its first argument is the owner, to which the attributes of ``graph`` belong.

    A search for a child or buffer of a module takes about as long as a call, and a graph names the
    same ones many times. So the function finds each module once, and calls composites without a
    dispatch where that would only call them:

        y = torch.ops.bnrewrite.batch_norm.default(x, self.bn.weight, self.bn.bias, ...)

        own_bn = self.bn
        y = run_composite(torch.ops.bnrewrite.batch_norm.default, x, own_bn.weight, ...)
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
            # A site asks when it runs; for a convolution beside it any answer will do.
            is_for_site = any(user.target is not convolve for user in node.users)
            if is_for_site or question not in self._groups:
                self._groups[question] = self._plain_copy(node, copies)
            return self._groups[question]
        return self._plain_copy(node, copies)

    def _plain_copy(self, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        attributes = _attributes_in((node.args, node.kwargs))
        reads = {path: self._read(path) for path in attributes}
        called = None
        if node.op == "call_module" and any(map(keyword.iskeyword, str(node.target).split("."))):
            called = self._read(str(node.target))
        addends = self._addends(node, copies)
        known = copies | addends if addends else copies
        copy = self.graph.node_copy(node, known.__getitem__)
        if reads:
            copy.args = _with_reads(copy.args, reads)
            copy.kwargs = _with_reads(copy.kwargs, reads)
        if called is not None:
            copy.op, copy.target, copy.args = "call_function", _call, (called, *copy.args)
        if is_composite(node.target):
            copy.target, copy.args = run_composite, (node.target, *copy.args)
        if node.op == "call_function" and node.target in _IN_PLACE:
            copy.target = _IN_PLACE[node.target]
        return copy

    def _addends(self, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Nodes that make tensors of what ``node`` adds to a result, where it may be a number."""
        residual: Any = None
        if node.target in (BATCH_NORM_ACT, FINISH_BATCH_NORM):
            residual = argument(node, "residual")
        return {
            one: self.graph.call_function(addend, (copies[one],))
            for one in (residual if isinstance(residual, (list, tuple)) else [residual])
            if isinstance(one, fx.Node) and may_be_number(one)
        }

    def _read(self, path: str) -> fx.Node:
        """A node that reads the attribute at ``path``."""
        holder, _, name = path.rpartition(".")
        # Not the name of an argument, of which "self" is one.
        variable = f"own_{path.replace('.', '_')}"
        if holder and holder not in self._modules:
            self._modules[holder] = self._read(holder)
        source: Any = self._modules[holder] if holder else _OWNER
        # fx spells out getattr, also where that is no code.
        read = _attribute if keyword.iskeyword(name) else getattr
        return self.graph.create_node("call_function", read, (source, name), name=variable)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    """An operator like ``+=`` as a function that code can call.

    fx spells out ``a += b``, which gives ``a`` another value if it is a number: so it would get in
    code with ``c = a; c += b``, too.
    """
    change = getattr(operator, name)

    def changed(value: Any, other: Any) -> Any:
        return change(value, other)

    changed.__name__ = changed.__qualname__ = f"_{name}"
    return changed


_IN_PLACE = {
    getattr(operator, name): _in_place(name) for name in inplace_methods if name != "setitem"
}


class _Owner:
    """The owner as an argument of a node."""

    def __repr__(self) -> str:
        return "self"


_OWNER: Any = _Owner()


def _attribute(source: Any, name: str) -> Any:
    return getattr(source, name)


def _call(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


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
