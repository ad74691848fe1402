"""A captured graph: how it is called, when it stands for the forward, and the code it became."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor, fx, nn

from bnrewrite.capture.assumptions import Assumptions, below
from bnrewrite.passes.base import Rewrite
from bnrewrite.sites.floor import has_global_hooks, has_hooks, is_site


@dataclasses.dataclass
class Captured:
    """A captured graph, how it is called, and what must hold for it to stand for the forward.

    Attributes:
        graph: the graph; its attributes are those of the owner.
        training: the mode in which the owner was traced.
        arguments: names of the required arguments, in order.
        defaults: optional arguments and the values they must keep.
        tensor_arguments: positions of the arguments that must be tensors.
        assumptions: what else was baked in.
        sites: paths of the BatchNorm modules whose calls became ops.
        function: the compiled graph; its first argument is the owner.
    """

    graph: fx.Graph
    training: bool
    arguments: list[str]
    defaults: dict[str, Any]
    tensor_arguments: list[int]
    assumptions: Assumptions
    sites: list[str] = dataclasses.field(default_factory=list)
    code: str = ""
    function: Callable[..., Any] | None = None

    @property
    def inlined(self) -> Collection[str]:
        """Paths of the modules whose forwards are part of the graph."""
        return self.assumptions.classes.keys()

    def finish(self, owner: nn.Module) -> None:
        """Makes the function from the rewritten graph, as ``fx.GraphModule`` does."""
        self.graph.lint()
        python = self.graph.python_code("self")
        self.code = python.src
        self.function = fx.graph_module._forward_from_src(python.src, python.globals.copy())
        calls = {str(node.target) for node in self.graph.find_nodes(op="call_module")}
        prefixes = {
            str(node.target).rpartition(".")[0] for node in self.graph.find_nodes(op="get_attr")
        }
        self.sites = sorted(
            path for path in prefixes - calls if path and is_site(owner.get_submodule(path))
        )

    def order(self) -> tuple[str, ...]:
        """The calls of our ops in order, with the paths of their sites."""
        return tuple(
            f"{node.target._opname}({', '.join(site.path or 'F.batch_norm' for site in sites)})"
            for node, sites in self._calls()
        )

    def functional_sites(self) -> list[Rewrite]:
        """The sites that are calls of ``F.batch_norm``, once each."""
        found = {site.name: site for _, sites in self._calls() for site in sites}
        return [site for site in found.values() if site.path is None]

    def _calls(self) -> Iterator[tuple[Any, list[Rewrite]]]:
        for node in self.graph.nodes:
            if getattr(node.target, "namespace", "") == "bnrewrite":
                one = node.meta.get("site")
                yield node, node.meta.get("sites") or ([] if one is None else [one])

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The required arguments in order, or None if the call has another form."""
        if kwargs or len(args) != len(self.arguments):
            names = [*self.arguments, *self.defaults]
            if len(args) > len(names):
                return None
            values = dict(zip(names, args, strict=False))
            for name, value in kwargs.items():
                if name not in names or name in values:
                    return None
                values[name] = value
            if any(values.pop(name, value) is not value for name, value in self.defaults.items()):
                return None
            if len(values) != len(self.arguments):
                return None
            args = tuple(values[name] for name in self.arguments)
        for position in self.tensor_arguments:
            if not isinstance(args[position], Tensor):
                return None
        return args

    def holds(self, owner: nn.Module) -> bool:
        """Whether all that was baked in is still as it was, and no site has grown a hook."""
        if has_global_hooks():
            return False
        try:
            if not self.assumptions.hold(owner):
                return False
            for path in self.sites:
                site = below(owner, path)
                if not is_site(site) or has_hooks(site):
                    return False
        except AttributeError:
            # A module that the graph calls is gone.
            return False
        return True
