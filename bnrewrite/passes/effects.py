"""Which order of a graph's nodes means something: what a pass that moves nodes must keep.

A graph names the values that a node reads, but not what else connects nodes: one writes in place
into memory that another one reads, two draw random numbers, two move the same running statistics.
:class:`Order` finds these connections. Where it does not know what a node does, it assumes the
worst, so that a node moves only where nobody can notice.
"""

import operator
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx, nn

from bnrewrite.groups import active_group, place_in
from bnrewrite.ops.batch_norm import BATCH_NORM
from bnrewrite.ops.batch_norm_act import BATCH_NORM_ACT
from bnrewrite.ops.library import argument
from bnrewrite.ops.shared_batch_norm import FINISH_BATCH_NORM, START_BATCH_NORM
from bnrewrite.ops.shuffle_batch_norm import SHUFFLE_BATCH_NORM
from bnrewrite.passes.base import Attribute
from bnrewrite.passes.torch_calls import Does, function_does, layer_does
from bnrewrite.passes.writes import written_arguments
from bnrewrite.sites.classes import below
from bnrewrite.sites.floor import checked_input, has_hooks, is_site

SITES = (BATCH_NORM, BATCH_NORM_ACT, SHUFFLE_BATCH_NORM)
"""Ops that evaluate one site: input first, then its tensors."""

_OURS = (checked_input, active_group, place_in, *SITES, START_BATCH_NORM, FINISH_BATCH_NORM)

_RANDOM = ("random numbers",)
OUTSIDE = ("whatever a call may do besides",)
STATE = ("tensors of the module",)


class Order:
    """The order that the nodes of one graph must keep.

    Attributes:
        before: for each node those that must run before it.
        beside: for each node those of ``before`` that may run at the same time, as long as their
            effects come first: earlier evaluations of the same BatchNorm module.
        writes: for each node what it writes, in the names of ``memory`` and of this module.
        flags: ``inplace`` flags that were looked at, by path and name, with their values.
    """

    def __init__(self, owner: nn.Module, graph: fx.Graph) -> None:
        self._owner = owner
        self.memory = _Memory(owner, graph)
        self.before: dict[fx.Node, set[fx.Node]] = {}
        self.beside: dict[fx.Node, set[fx.Node]] = {}
        self.writes: dict[fx.Node, set[Hashable]] = {}
        self.flags: dict[tuple[str, str], Any] = {}
        self._states: set[fx.Node] = set()
        readers: dict[Hashable, list[fx.Node]] = {}
        writers: dict[Hashable, fx.Node] = {}
        for node in graph.nodes:
            inputs = node.all_input_nodes
            before = self.before[node] = set(inputs)
            beside = self.beside[node] = set()
            reads, writes = self._uses(node, inputs)
            self.writes[node] = writes
            for thing in reads | writes:
                if thing in writers and self._same_site(node, writers[thing]):
                    beside.add(writers[thing])
                elif thing in writers:
                    before.add(writers[thing])
            for thing in writes:
                before.update(readers.pop(thing, ()))
                writers[thing] = node
            for thing in reads - writes:
                readers.setdefault(thing, []).append(node)
            before.discard(node)
            beside -= before
            before |= beside

    def _same_site(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether two nodes evaluate one and the same BatchNorm module."""
        modules = []
        for one in (node, other):
            site = one.meta.get("site")
            if one.target is not BATCH_NORM or site is None or site.path is None:
                return False
            modules.append(below(self._owner, site.path))
        return modules[0] is modules[1]

    def _uses(self, node: fx.Node, inputs: list[fx.Node]) -> tuple[set[Hashable], set[Hashable]]:
        """What a node reads and writes, beyond the values that it is given and makes."""
        if node.op in ("placeholder", "get_attr"):
            # They name a tensor; what reads it are their users. A call may put another one there.
            if node.op == "placeholder" or not self._is_state(node):
                return set(), set()
            self._states.add(node)
            return {STATE}, set()
        reads: set[Hashable] = set(map(self.memory.of, inputs))
        writes: set[Hashable] = set()
        if node.op == "call_module":
            self._add_call(node, inputs, writes)
        elif node.op == "call_function" and node.target in _OURS:
            for value in _running(node):
                writes |= {self.memory.of_value(value), ("site", _site_of(self._owner, value))}
        elif node.op in ("call_function", "call_method"):
            self._add_function(node, inputs, writes)
        if node.target not in _OURS and not self._states.isdisjoint(inputs):
            reads.add(STATE)
        return reads, writes

    def _add_call(self, node: fx.Node, inputs: list[fx.Node], writes: set[Hashable]) -> None:
        module = below(self._owner, str(node.target))
        inside = module.modules() if module._modules else (module,)
        writes.update(("site", id(child)) for child in inside if is_site(child) or _moves(child))
        if not is_known_leaf(module):
            writes.update((_RANDOM, OUTSIDE, STATE))
            writes.update(map(self.memory.of, inputs))
        elif Does.RANDOM in layer_does(type(module)):
            writes.add(_RANDOM)
        if "inplace" in module.__dict__:
            self.flags[str(node.target), "inplace"] = module.inplace
        if getattr(module, "inplace", False):
            writes.update(map(self.memory.of, inputs))

    def _add_function(self, node: fx.Node, inputs: list[fx.Node], writes: set[Hashable]) -> None:
        written = self.memory.written(node)
        if written is None:
            writes.update((_RANDOM, OUTSIDE, STATE))
            written = inputs
        for value in written:
            if isinstance(value, fx.Node):
                writes.add(self.memory.of(value))
                if value in self._states:
                    writes.add(STATE)
        if Does.RANDOM in function_does(node):
            writes.add(_RANDOM)

    def _is_state(self, node: fx.Node) -> bool:
        """Whether ``node`` reads a tensor that calls of modules may change, and is no parameter."""
        path, _, name = str(node.target).rpartition(".")
        home = below(self._owner, path)
        if is_site(home) or isinstance(getattr(home, "_parameters", {}).get(name), nn.Parameter):
            return False
        value = getattr(home, name)
        return isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)


class _Memory:
    """Which values of a graph may share memory: a name for each set of those that may."""

    def __init__(self, owner: nn.Module, graph: fx.Graph) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._tensors: set[fx.Node] = set()
        self._written: dict[fx.Node, list[Any] | None] = {}
        self._first = first = {}
        for node in graph.nodes:
            self._parent[node] = node
            if node.op == "placeholder":
                # Two arguments may be the same tensor.
                self._join(node, first.setdefault("arguments", node))
            elif node.op == "get_attr":
                self._join(node, first.setdefault(node.target, node))
            elif not self._is_fresh(owner, node):
                for source in self._returned(node):
                    self._join(node, source)

    def of(self, node: fx.Node) -> Hashable:
        """The name of the set that ``node`` belongs to."""
        while self._parent[node] is not node:
            node = self._parent[node]
        return node

    def of_value(self, value: fx.Node | Attribute) -> Hashable:
        """The same for what may be an attribute that another node reads, too."""
        if isinstance(value, fx.Node):
            return self.of(value)
        return self.of(self._first[value.path]) if value.path in self._first else value

    def written(self, node: fx.Node) -> list[Any] | None:
        """Arguments that a function or method writes in place; None if nobody knows."""
        if node not in self._written:
            self._written[node] = written_arguments(node)
        return self._written[node]

    def _is_fresh(self, owner: nn.Module, node: fx.Node) -> bool:
        """Whether the result of ``node`` certainly shares no memory with its arguments."""
        if node.op == "call_module":
            module = below(owner, str(node.target))
            fresh = (
                is_known_leaf(module)
                and Does.FRESH in layer_does(type(module))
                and not getattr(module, "inplace", False)
            )
        elif node.op not in ("call_function", "call_method"):
            return False
        elif node.target in (*SITES, START_BATCH_NORM, FINISH_BATCH_NORM):
            fresh = True
        else:
            fresh = Does.FRESH in function_does(node) and self.written(node) == []
            if node.target in (operator.add, operator.mul):
                # Of lists they make a list of the same tensors; of a tensor, a new one.
                fresh = fresh and not self._tensors.isdisjoint(node.all_input_nodes)
        if fresh:
            self._tensors.add(node)
        return fresh

    def _returned(self, node: fx.Node) -> list[fx.Node]:
        """Arguments whose memory the result of ``node`` may share."""
        first: Any = node.args[0] if node.args else None
        # What arithmetic in place reads besides, a tensor does not keep; a list would.
        if self.written(node) == [first] and first in self._tensors:
            self._tensors.add(node)
            return [first]
        return node.all_input_nodes

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        root_a, root_b = self.of(a), self.of(b)
        if root_a is not root_b:
            self._parent[root_a] = root_b  # pyright: ignore[reportArgumentType]


def is_known_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own layers, of which it is known what a call does."""
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        and not has_hooks(module)
    )


def _moves(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats


def _running(node: fx.Node) -> Iterator[fx.Node | Attribute]:
    """The running statistics that one of our ops moves."""
    if node.target not in SITES and node.target is not FINISH_BATCH_NORM:
        return
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        given = argument(node, name)
        for value in given if node.target is FINISH_BATCH_NORM else (given,):
            if isinstance(value, (fx.Node, Attribute)):
                yield value


def _site_of(owner: nn.Module, running: fx.Node | Attribute) -> Hashable:
    """Identity of the BatchNorm module that a running statistic belongs to, else of the value."""
    if isinstance(running, fx.Node) and running.op != "get_attr":
        return running
    path = str(running.target) if isinstance(running, fx.Node) else running.path
    return id(below(owner, path.rpartition(".")[0]))
