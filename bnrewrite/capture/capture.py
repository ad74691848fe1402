"""Capturing one module: trace its forward, run the passes, make the graph callable."""

import copy
import dataclasses
import inspect
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from bnrewrite.capture.assumptions import Assumptions
from bnrewrite.capture.captured import Captured
from bnrewrite.capture.tracer import OwnerTracer, Refused, required_arguments
from bnrewrite.modes import ModeTable
from bnrewrite.passes import run_optimising, run_required
from bnrewrite.passes.base import OwnerGraph, PassReport, joined
from bnrewrite.passes.replace_batch_norm import functional_name
from bnrewrite.sites.classes import below, converted_class, original_class
from bnrewrite.sites.floor import floor_recipe, has_hooks, is_site, site_state


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an owner was captured, in plain values, so that a loaded model can be captured again.

    Attributes:
        name: qualified name of the owner.
        modes: which mode each site gets.
        group: name of the process group of communicating sites.
        keep: patterns of modules that must stay callable units.
        passes: names of the optimising passes to run.
        untraced: names of modules with sites that could not be traced by themselves.
    """

    name: str
    modes: ModeTable
    group: str
    keep: tuple[str, ...]
    passes: tuple[str, ...]
    untraced: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Capture:
    """Outcome of capturing one module.

    Attributes:
        train: the graph for training; None if the module could not be captured or owns no site.
        eval: the graph for evaluation, the same object if one serves both.
        reports: what each pass did in the training graph, by pass name.
        refused: why the module could not be captured.
        assumptions: what the trace had read, if there is no graph.
    """

    train: Captured | None
    eval: Captured | None
    reports: dict[str, PassReport]
    refused: str | None = None
    assumptions: Assumptions | None = None

    def serves(self, module: nn.Module) -> bool:
        """Whether capturing ``module``, of the same structure, would come out the same."""
        graphs = [one for one in (self.train, self.eval) if one is not None]
        read = [form.assumptions for one in graphs for form in one.forms]
        read += [self.assumptions] if self.assumptions is not None else []
        return bool(read) and all(one.hold_for_another(module) for one in read)


Cache = dict[Any, list[Capture]]
"""Captures of earlier modules by class and structure: blocks of a network share their graphs."""


def capture(module: nn.Module, recipe: Recipe, cache: Cache) -> Capture:
    """Captures the forward of ``module`` for training and evaluation, and rewrites the graphs.

    Args:
        module: the module; it is left as it was.
        recipe: its name and what to do.
        cache: captures made so far with the same recipe but for the name; it is added to.
    """
    if "forward" in module.__dict__:
        return Capture(None, None, {}, "its forward was replaced on the instance")
    structure = _structure(module, recipe)
    for earlier in cache.get(structure, ()):
        if earlier.serves(module):
            return _renamed(earlier, module, recipe)
    result = _capture(module, recipe)
    cache.setdefault(structure, []).append(result)
    return result


def _capture(module: nn.Module, recipe: Recipe) -> Capture:
    flags = {child: child.training for child in module.modules() if "training" in child.__dict__}
    try:
        found = _capture_form(module, recipe, flags, lists=False)
        if found.eval is not None and found.eval.tensor_arguments:
            found = _with_lists(found, _capture_form(module, recipe, flags, lists=True))
    finally:
        for child, training in flags.items():
            child.__dict__["training"] = training
    return found


def _capture_form(
    module: nn.Module, recipe: Recipe, flags: dict[nn.Module, bool], *, lists: bool
) -> Capture:
    """Graphs for one form of call: arguments asked for their type are tensors, or lists."""
    try:
        train, reports = _trace(module, recipe, flags, training=True, lists=lists)
        owns_site = any(report.rewritten for report in reports.values())
        optimised, more = _optimise(module, recipe, flags, train, lists=lists)
        reports |= more
        if not owns_site and optimised is train:
            return Capture(None, None, reports, assumptions=optimised.assumptions)
        eval = train
        if train.assumptions.reads_training:
            eval, _ = _trace(module, recipe, flags, training=False, lists=lists)
            if eval.same_as(train):
                eval = train
        for one in {id(one): one for one in (optimised, eval)}.values():
            one.finish()
    except Refused as refused:
        return Capture(None, None, {}, str(refused), refused.assumptions)
    return Capture(optimised, eval, reports)


def _with_lists(tensors: Capture, lists: Capture) -> Capture:
    """Both forms in one; what the passes did with the second one is what they did with the first.

    Where no graph takes lists, calls with lists run the original forward.
    """
    train, eval = tensors.train, tensors.eval
    if train is None or eval is None or lists.train is None or lists.eval is None:
        return tensors
    with_lists = dataclasses.replace(train, otherwise=lists.train)
    if eval is train and lists.eval is lists.train:
        return dataclasses.replace(tensors, train=with_lists, eval=with_lists)
    return dataclasses.replace(
        tensors, train=with_lists, eval=dataclasses.replace(eval, otherwise=lists.eval)
    )


def _trace(
    module: nn.Module,
    recipe: Recipe,
    flags: dict[nn.Module, bool],
    *,
    training: bool,
    lists: bool,
    through: Collection[str] = (),
) -> tuple[Captured, dict[str, PassReport]]:
    """The graph of ``module``'s forward with its BatchNorm calls replaced."""
    tracer = OwnerTracer(through, lists=lists)
    for child in flags:
        child.__dict__["training"] = training
    traced = [module, *(below(module, path) for path in through)]
    classes = [type(one) for one in traced]
    for one in traced:
        one.__class__ = _without_owner(one)
    try:
        graph = tracer.trace(module)
    finally:
        for one, cls in zip(traced, classes, strict=True):
            one.__class__ = cls
    forward = original_class(module).forward
    asked = [
        index
        for index, node in enumerate(graph.find_nodes(op="placeholder"))
        if node.name in tracer.asked
    ]
    captured = Captured(
        graph=graph,
        training=training,
        arguments=required_arguments(forward),
        defaults={
            parameter.name: parameter.default
            for parameter in list(inspect.signature(forward).parameters.values())[1:]
            if parameter.default is not parameter.empty
        },
        tensor_arguments=[] if lists else asked,
        list_arguments=asked if lists else [],
        assumptions=tracer.assumptions,
    )
    return captured, run_required(_target(module, recipe, captured))


def _target(module: nn.Module, recipe: Recipe, captured: Captured) -> OwnerGraph:
    return OwnerGraph(
        recipe.name,
        module,
        captured.graph,
        captured.training,
        recipe.modes,
        recipe.group,
        recipe.keep,
        recipe.untraced,
    )


def _optimise(
    module: nn.Module,
    recipe: Recipe,
    flags: dict[nn.Module, bool],
    plain: Captured,
    *,
    lists: bool,
) -> tuple[Captured, dict[str, PassReport]]:
    """What the optimising passes make of a training graph; the graph itself if they gain nothing.

    Without a gain nothing is inlined either.
    """
    latest = plain

    def retrace(through: set[str]) -> tuple[fx.Graph, set[str]] | None:
        nonlocal latest
        while through:
            try:
                latest, _ = _trace(
                    module, recipe, flags, training=True, lists=lists, through=through
                )
            except Refused as refused:
                lost = {path for path in through if f"{path}.".startswith(f"{refused.scope}.")}
                if not lost:
                    return None
                through = through - lost
            else:
                return latest.graph, through
        return None

    # Passes change graphs with sites in place, and the plain one stays in use.
    own = copy.deepcopy(plain.graph) if any(plain.site_calls()) else plain.graph
    target = _target(module, recipe, dataclasses.replace(plain, graph=own))
    target.retrace = retrace
    reports = run_optimising(target, recipe.passes)
    gains = [name for name, report in reports.items() if name != "inline_children"]
    if not any(reports[name].rewritten for name in gains):
        if "inline_children" in reports:
            reports["inline_children"].rewritten.clear()
        return plain, reports
    assumptions = copy.copy(latest.assumptions)
    assumptions.constants = {**assumptions.constants, **target.flags}
    assumptions.classes = {**assumptions.classes, **target.absorbed}
    placeholders = [node.name for node in target.graph.find_nodes(op="placeholder")]
    tensors = {placeholders.index(name) for name in target.tensors}
    optimised = dataclasses.replace(
        latest,
        graph=target.graph,
        assumptions=assumptions,
        tensor_arguments=sorted({*latest.tensor_arguments, *tensors}),
    )
    return optimised, reports


def _without_owner(module: nn.Module) -> type:
    """The class with which ``module`` is traced: a site's floor, without an owner's forward."""
    if is_site(module):
        return converted_class(original_class(module), floor_recipe(module))
    return original_class(module)


def _structure(module: nn.Module, recipe: Recipe) -> Any:
    """What must be equal for two modules to share a graph, besides what their traces read."""
    first: dict[int, int] = {}
    inside: list[tuple] = []
    sites: list[tuple] = []
    marked: list[tuple[str, bool]] = []
    watched = bool(recipe.untraced or recipe.keep)
    for path, child in module.named_modules(remove_duplicate=False):
        number = first.setdefault(id(child), len(first))
        inside.append((path, original_class(child), number, has_hooks(child)))
        if is_site(child):
            state = site_state(child)
            running = first.setdefault(id(child.running_mean), len(first))
            sites.append((path, state.mode, state.group, running))
        name = joined(recipe.name, path) if watched else ""
        if watched and (
            name in recipe.untraced or any(fnmatchcase(name, pattern) for pattern in recipe.keep)
        ):
            marked.append((path, name in recipe.untraced))
    functional = tuple(
        recipe.modes.find(functional_name(recipe.name, index)) for index in range(_FUNCTIONAL)
    )
    return tuple(inside), tuple(sites), functional, tuple(marked)


_FUNCTIONAL = 8
"""Functional sites of one owner whose modes are compared; modules with more are rare, and patterns
that tell the ninth from the eighth rarer."""


def _renamed(earlier: Capture, module: nn.Module, recipe: Recipe) -> Capture:
    def name_of(name: str, path: str | None, owner: str) -> str:
        if path is not None:
            child = below(module, path)
            return site_state(child).name if is_site(child) else joined(recipe.name, path)
        if is_site(module):
            return site_state(module).name
        return joined(recipe.name, name.removeprefix(f"{owner}."))

    reports = {
        name: report.renamed(recipe.name, name_of) for name, report in earlier.reports.items()
    }
    return dataclasses.replace(earlier, reports=reports)
