"""A captured graph: how it is called, when it stands for the forward, and the code it became."""

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnrewrite.capture.alike import alike, nodes_alike
from bnrewrite.capture.assumptions import CLASS, HOOKS, Assumptions, Place
from bnrewrite.capture.code import function_of
from bnrewrite.capture.elements import Element, are_tensors
from bnrewrite.capture.outside import COMPILING
from bnrewrite.capture.values import same
from bnrewrite.guards import guard_answer, is_compiling
from bnrewrite.modes import Mode
from bnrewrite.ops.library import is_traced_by_jit
from bnrewrite.ops.shared_batch_norm import START_BATCH_NORM
from bnrewrite.passes.base import Rewrite, joined
from bnrewrite.sites.classes import below
from bnrewrite.sites.floor import (
    has_global_hooks,
    has_hooks_of_its_own,
    is_site,
    site_state,
)
from bnrewrite.sites.intercept import FUNCTIONS


@dataclasses.dataclass
class Captured:
    """A captured graph, how it is called, and what must hold for it to stand for the forward.

    Attributes:
        graph: the graph; its attributes are those of the owner.
        training: the mode in which the owner was traced.
        arguments: names of the arguments that become placeholders, in order.
        defaults: other arguments and the values they must keep.
        names: of all arguments, in order.
        num_positional: how many of them a call may give by position.
        tensor_arguments: positions of the arguments that must be tensors.
        list_arguments: positions of those that must be lists.
        compares_arguments: whether the forward asked whether one is None, which none ever is.
        elements: parts of arguments that must be tensors.
        assumptions: what else was baked in.
        sites: mode and group of the BatchNorm modules whose calls became ops, by path.
        function: the compiled graph; its first argument is the owner. None until the first call.
        otherwise: the graph for calls of another form, if there is one.
        key: of the captured graph in this process.
        shares: whether its collectives are others than those of its sites by themselves.
    """

    graph: fx.Graph
    training: bool
    arguments: list[str]
    defaults: dict[str, Any]
    names: list[str]
    num_positional: int
    tensor_arguments: list[int]
    assumptions: Assumptions
    sites: dict[str, tuple[Mode, str]] = dataclasses.field(default_factory=dict)
    list_arguments: list[int] = dataclasses.field(default_factory=list)
    compares_arguments: bool = False
    elements: list[Element] = dataclasses.field(default_factory=list)
    function: Callable[..., Any] | None = None
    otherwise: "Captured | None" = None
    key: str = dataclasses.field(init=False, compare=False)
    shares: bool = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        # A string, since compilers take a number that differs between graphs for a dynamic size.
        self.key = str(next(_keys))
        _living[self.key] = self
        self.shares = any(node.target is START_BATCH_NORM for node in self.graph.nodes)

    @property
    def inlined(self) -> Collection[str]:
        """Paths of the modules whose forwards are part of the graph."""
        return self.assumptions.classes.keys()

    def finish(self, owner: nn.Module) -> None:
        """Checks the rewritten graph, and finds the sites whose modules it stands for."""
        self.graph.lint()
        calls = {str(node.target) for node in self.graph.find_nodes(op="call_module")}
        paths = {site.path for _, sites in self.site_calls() for site in sites}
        found = sorted(path for path in paths - calls if path)
        states = {path: site_state(below(owner, path)) for path in found}
        self.sites = {path: (state.mode, state.group) for path, state in states.items()}

    def run(self, owner: nn.Module, values: tuple[Any, ...]) -> Any:
        """What the graph makes of the required arguments; the first call compiles it."""
        if is_compiling():
            _compile_while_compiling(self.key)
        elif self.function is None:
            self.compile()
        return self.function(owner, *values)  # pyright: ignore[reportOptionalCall]

    def compile(self) -> None:
        """Makes the function."""
        self.function = function_of(self.graph)

    def same_as(self, other: "Captured") -> bool:
        """Whether the other graph does the same under the same conditions."""
        return (
            self.tensor_arguments == other.tensor_arguments
            and self.list_arguments == other.list_arguments
            and alike(self.elements, other.elements)
            and nodes_alike(self.graph, other.graph)
            and alike(self.assumptions, other.assumptions)
        )

    @property
    def forms(self) -> "tuple[Captured, ...]":
        """This graph and those for calls of other forms."""
        return (self,) if self.otherwise is None else (self, *self.otherwise.forms)

    def order(self) -> tuple[str, ...]:
        """The calls of our ops in order, with the paths of their sites."""
        return tuple(
            f"{node.target._opname}({', '.join(site.path or 'F.batch_norm' for site in sites)})"
            for form in self.forms
            for node, sites in form.site_calls()
        )

    def functional_sites(self) -> list[Rewrite]:
        """The sites that are calls of ``F.batch_norm``, once each."""
        found = {
            site.name: site
            for form in self.forms
            for _, sites in form.site_calls()
            for site in sites
        }
        return [site for site in found.values() if site.path is None]

    @property
    def leaves_functions(self) -> bool:
        """Whether there are calls of ``F.batch_norm`` that are no sites."""
        return any(node.target in FUNCTIONS for form in self.forms for node in form.graph.nodes)

    def site_calls(self) -> Iterator[tuple[Any, list[Rewrite]]]:
        """Nodes of our ops with the sites that they evaluate."""
        for node in self.graph.nodes:
            if getattr(node.target, "namespace", "") == "bnrewrite":
                one = node.meta.get("site")
                yield node, node.meta.get("sites") or ([] if one is None else [one])

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Values of the placeholders in order, or None if the call has another form."""
        if len(args) > self.num_positional:
            return None
        if kwargs or self.names[: len(args)] != self.arguments:
            values = dict(zip(self.names, args, strict=False))
            for name, value in kwargs.items():
                if name not in self.names or name in values:
                    return None
                values[name] = value
            for name, value in self.defaults.items():
                if not _is_default(values.pop(name, value), value):
                    return None
            if values.keys() != set(self.arguments):
                return None
            args = tuple(values[name] for name in self.arguments)
        if any(value is None for value in args):
            # Code asks for None, and in a trace no argument is.
            return None
        for position in self.tensor_arguments:
            if not isinstance(args[position], Tensor):
                return None
        for position in self.list_arguments:
            if type(args[position]) is not list:
                return None
        if self.elements and not are_tensors(
            self.elements, dict(zip(self.arguments, args, strict=True))
        ):
            return None
        return args

    def holds(self, owner: nn.Module) -> bool:
        """Whether all that was baked in is still as it was, and no site has grown a hook."""
        if has_global_hooks() or not self._outside_holds():
            return False
        if self.shares and not is_compiling() and is_traced_by_jit():
            # TorchScript takes no lists of optional tensors.
            return False
        try:
            return self.assumptions.change(owner) is None and self._changed_site(owner) is None
        except AttributeError:
            # A module that the graph calls is gone.
            return False

    def left_because(self, owner: nn.Module) -> str | None:
        """Why a training step runs the forward of the owner itself; None if it runs the graph."""
        if has_global_hooks():
            return "there are hooks on all modules"
        if not self.assumptions.outside.values_hold():
            return "what it reads besides modules has changed"
        try:
            place = self.assumptions.change(owner, ignored="training") or self._changed_site(owner)
        except AttributeError:
            return "a module that it called is gone"
        if place is None:
            return None
        path, what = place
        values = self.assumptions.constants.get(place), vars(below(owner, path)).get(what)
        if all(isinstance(value, (bool, int, float, str)) for value in values):
            return f"{joined(path, what)} was {values[0]!r} and is {values[1]!r}"
        return f"{what} of {path or 'the module itself'} changed"

    def _changed_site(self, owner: nn.Module) -> Place | None:
        """A site that is not what it was, or has grown a hook.

        A part of a converted model may be converted anew.
        """
        for path, (mode, group) in self.sites.items():
            site = below(owner, path)
            if not is_site(site):
                return path, CLASS
            if has_hooks_of_its_own(site):
                return path, HOOKS
            state = site_state(site)
            if not (state.mode is mode or state.mode == mode) or state.group != group:
                return path, "mode or group"
        return None

    def _outside_holds(self) -> bool:
        outside = self.assumptions.outside
        if is_compiling():
            return outside.is_empty or _outside_holds_while_compiling(self.key)
        return outside.holds()


_keys = itertools.count()
_living: "weakref.WeakValueDictionary[str, Captured]" = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result
def _compile_while_compiling(key: str) -> None:
    """The function must be there before a compiler reads it, and be there when it guards."""
    captured = _living.get(key)
    if captured is not None and captured.function is None:
        captured.compile()


@torch.compiler.assume_constant_result
def _outside_holds_while_compiling(key: str) -> bool:
    """What a compiler need not look into; it looks again before each call of what it makes."""
    captured = _living.get(key)
    if captured is None or captured.assumptions.outside.answers.keys() & COMPILING:
        return False
    return guard_answer(f"outside {key}", captured.assumptions.outside.holds)


def _is_default(value: Any, default: Any) -> bool:
    """Whether a call gives the default, or a constant of the same type that equals it."""
    if value is default:
        return True
    kind = type(default)
    if kind is tuple:
        equal = type(value) is tuple and len(value) == len(default)
        return equal and all(map(_is_default, value, default))
    return kind in _EQUAL and same(value, default)


_EQUAL = (bool, int, float, str, bytes, torch.dtype, torch.device)
"""Types of defaults that are what they equal."""
