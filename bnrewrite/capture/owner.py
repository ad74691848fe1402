"""Owners: modules whose forward runs a captured graph while that does the same as the original."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnrewrite.capture.tracer import OwnerTracer, Read, Refused, required_arguments
from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.modes import Frozen, ModeTable
from bnrewrite.passes import run_passes
from bnrewrite.passes.base import OwnerGraph, PassReport
from bnrewrite.sites.classes import (
    Converted,
    change_class,
    converted_class,
    original_class,
    restore_class,
)
from bnrewrite.sites.floor import (
    SITE_TENSORS,
    Intercept,
    floor_recipe,
    has_hooks,
    is_site,
    site_state,
)

_STATE = "_bnrewrite_owner"


@dataclasses.dataclass
class Captured:
    """A captured graph, how it is called, and what must hold for it to stand for the forward.

    Attributes:
        graph: the graph; its attributes are those of the owner.
        arguments: names of the required arguments, in order.
        defaults: optional arguments and the values they must keep.
        tensor_arguments: positions of the arguments that must be tensors.
        reads: attributes that were baked in.
        lengths: containers that were iterated, with their sizes.
        sites: paths of the BatchNorm modules whose calls became ops.
        function: the compiled graph; its first argument is the owner.
    """

    graph: fx.Graph
    arguments: list[str]
    defaults: dict[str, Any]
    tensor_arguments: list[int]
    reads: list[Read]
    lengths: list[tuple[str, int]]
    sites: list[str] = dataclasses.field(default_factory=list)
    code: str = ""
    function: Callable[..., Any] | None = None

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
        if torch.nn.modules.module._has_any_global_hook():
            return False
        for read in self.reads:
            values = _below(owner, read.path).__dict__
            if read.name not in values or not _same(values[read.name], read.value):
                return False
        for path, length in self.lengths:
            if len(_below(owner, path)._modules) != length:
                return False
        for path in self.sites:
            site = _below(owner, path)
            if not is_site(site) or has_hooks(site):
                return False
        return True


def _below(module: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def _same(value: Any, before: Any) -> bool:
    return value is before or (type(value) is type(before) and value == before)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an owner was captured, in plain values, so that a loaded model can be captured again."""

    name: str
    modes: ModeTable
    group: str
    passes: tuple[str, ...]


class OwnerState:
    """The captured graphs of one owner and how they came about.

    Copies share it, since graphs name attributes of whatever owner they run on. Pickles hold the
    recipe only, and capture again when the owner is loaded.
    """

    def __init__(self, recipe: Recipe, train: Captured, eval: Captured) -> None:
        self.recipe = recipe
        self.train = train
        self.eval = eval

    @property
    def differs(self) -> bool:
        """Whether training and evaluation need graphs of their own."""
        return self.train is not self.eval

    def __deepcopy__(self, memo: dict) -> "OwnerState":
        return self

    def __reduce__(self) -> tuple:
        return (_Pickled, (self.recipe,))


@dataclasses.dataclass(frozen=True)
class _Pickled:
    """An :class:`OwnerState` on its way through a pickle."""

    recipe: Recipe


class OwnerForward(Converted):
    """``forward`` of an owner."""

    _bnrewrite_owner: OwnerState | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The captured graph where it stands for this call, else the original forward."""
        module: Any = self
        state = self._bnrewrite_owner
        frozen = is_site(module) and isinstance(site_state(module).mode, Frozen)
        training = module.training and not frozen
        if state is not None:
            captured = state.train if training else state.eval
            values = captured.bind(args, kwargs)
            if values is not None and captured.holds(module):
                try:
                    return captured.function(self, *values)  # pyright: ignore
                except UnsupportedBatchNorm as error:
                    raise _named(module, captured, error) from error
        original = super().forward  # pyright: ignore
        if not is_site(module):
            return original(*args, **kwargs)
        was_training, module.training = module.training, training
        try:
            with Intercept(module):
                return original(*args, **kwargs)
        finally:
            module.training = was_training

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore
        if isinstance(self._bnrewrite_owner, _Pickled):
            module: Any = self
            recipe = self._bnrewrite_owner.recipe
            module.__dict__[_STATE] = None
            module.__dict__[_STATE] = capture_owner(module, recipe).state


@dataclasses.dataclass
class Capture:
    """Outcome of capturing one module.

    Attributes:
        state: the graphs; None if the module could not be captured or owns no site.
        reports: what each pass did in the training graph, by pass name.
        refused: why the module could not be captured.
    """

    state: OwnerState | None
    reports: dict[str, PassReport]
    refused: str | None = None


def capture_owner(module: nn.Module, recipe: Recipe) -> Capture:
    """Traces the forward of ``module`` in training and evaluation and runs the passes."""
    original = original_class(module)
    if "forward" in module.__dict__:
        return Capture(None, {}, "its forward was replaced on the instance")
    captured: list[Captured] = []
    reports: list[dict[str, PassReport]] = []
    flags = {child: child.training for child in module.modules() if "training" in child.__dict__}
    converted = type(module)
    module.__class__ = _without_owner(module)
    try:
        for training in (True, False):
            for child in flags:
                child.__dict__["training"] = training
            one = _trace(module, original.forward)
            target = OwnerGraph(
                recipe.name, module, one.graph, training, recipe.modes, recipe.group
            )
            reports.append(run_passes(target, recipe.passes))
            one.finish(module)
            captured.append(one)
    except Refused as refused:
        return Capture(None, {}, str(refused))
    finally:
        for child, training in flags.items():
            child.__dict__["training"] = training
        module.__class__ = converted
    train, eval = captured
    if train.code == eval.code:
        eval = train
    if not any(report.rewritten for report in reports[0].values()):
        return Capture(None, reports[0])
    return Capture(OwnerState(recipe, train, eval), reports[0])


def _without_owner(module: nn.Module) -> type:
    """The class with which ``module`` is traced: a site's floor, without an owner's forward."""
    if is_site(module):
        return converted_class(original_class(module), floor_recipe(module))
    return original_class(module)


def _trace(module: nn.Module, forward: Callable[..., Any]) -> Captured:
    tracer = OwnerTracer()
    graph = tracer.trace(module)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    arguments = required_arguments(forward)
    return Captured(
        graph=graph,
        arguments=arguments,
        defaults={
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.default is not parameter.empty
        },
        tensor_arguments=[
            index
            for index, node in enumerate(graph.find_nodes(op="placeholder"))
            if node.name in tracer.tensor_arguments
        ],
        reads=list(tracer.reads.values()),
        lengths=list(tracer.lengths.items()),
    )


def attach_owner(module: nn.Module, state: OwnerState | None) -> None:
    """Turns a module into an owner, in place; None leaves it on the floor with interception."""
    module.__dict__[_STATE] = state
    recipe = floor_recipe(module) if is_site(module) else (None,)
    change_class(module, (OwnerForward, *recipe))


def is_owner(module: nn.Module) -> bool:
    """Whether ``module`` runs a captured graph, or would if it could be captured."""
    return _STATE in module.__dict__


def owner_state(module: nn.Module) -> OwnerState | None:
    """The captured graphs of an owner."""
    return module.__dict__[_STATE]


def detach_owner(module: nn.Module) -> None:
    """Exact inverse of :func:`attach_owner`."""
    del module.__dict__[_STATE]
    if is_site(module):
        change_class(module, floor_recipe(module))
    else:
        restore_class(module)


def _named(
    owner: nn.Module, captured: Captured, error: UnsupportedBatchNorm
) -> UnsupportedBatchNorm:
    """The error with the name of the site whose parameters the failed op was given."""
    for path in captured.sites:
        site = owner.get_submodule(path)
        own = [getattr(site, name) for name in SITE_TENSORS]
        if any(mine is not None and mine is its for mine in own for its in error.tensors):
            return site_state(site).named(error)
    return error
