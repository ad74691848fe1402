"""Capturing one module: trace its forward, run the passes, make the graph callable."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from bnrewrite.capture.assumptions import Assumptions
from bnrewrite.capture.captured import Captured
from bnrewrite.capture.tracer import OwnerTracer, Refused, required_arguments
from bnrewrite.modes import ModeTable
from bnrewrite.passes import run_passes
from bnrewrite.passes.base import OwnerGraph, PassReport
from bnrewrite.passes.replace_batch_norm import functional_name
from bnrewrite.sites.classes import converted_class, original_class
from bnrewrite.sites.floor import floor_recipe, has_hooks, is_site, site_state


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an owner was captured, in plain values, so that a loaded model can be captured again."""

    name: str
    modes: ModeTable
    group: str
    passes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Capture:
    """Outcome of capturing one module.

    Attributes:
        train: the graph for training; None if the module could not be captured or owns no site.
        eval: the graph for evaluation, the same object if one serves both.
        reports: what each pass did in the training graph, by pass name.
        refused: why the module could not be captured.
        assumptions: what the trace that was refused had read by then.
    """

    train: Captured | None
    eval: Captured | None
    reports: dict[str, PassReport]
    refused: str | None = None
    assumptions: Assumptions | None = None

    def serves(self, module: nn.Module) -> bool:
        """Whether capturing ``module``, of the same structure, would come out the same."""
        read = [one.assumptions for one in (self.train, self.eval) if one is not None]
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
    converted = type(module)
    module.__class__ = _without_owner(module)
    try:
        train, reports = _capture_one(module, recipe, flags, training=True)
        if not any(report.rewritten for report in reports.values()):
            return Capture(None, None, reports)
        eval = train
        if train.assumptions.reads_training:
            eval, _ = _capture_one(module, recipe, flags, training=False)
            if eval.code == train.code and eval.assumptions == train.assumptions:
                eval = train
    except Refused as refused:
        return Capture(None, None, {}, str(refused), refused.assumptions)
    finally:
        for child, training in flags.items():
            child.__dict__["training"] = training
        module.__class__ = converted
    return Capture(train, eval, reports)


def _capture_one(
    module: nn.Module, recipe: Recipe, flags: dict[nn.Module, bool], *, training: bool
) -> tuple[Captured, dict[str, PassReport]]:
    for child in flags:
        child.__dict__["training"] = training
    tracer = OwnerTracer()
    graph = tracer.trace(module)
    forward = original_class(module).forward
    captured = Captured(
        graph=graph,
        arguments=required_arguments(forward),
        defaults={
            parameter.name: parameter.default
            for parameter in list(inspect.signature(forward).parameters.values())[1:]
            if parameter.default is not parameter.empty
        },
        tensor_arguments=[
            index
            for index, node in enumerate(graph.find_nodes(op="placeholder"))
            if node.name in tracer.tensor_arguments
        ],
        assumptions=tracer.assumptions,
    )
    target = OwnerGraph(recipe.name, module, graph, training, recipe.modes, recipe.group)
    reports = run_passes(target, recipe.passes)
    # The graph for evaluation serves an owner even if it has no site itself.
    if not training or any(report.rewritten for report in reports.values()):
        captured.finish(module)
    return captured, reports


def _without_owner(module: nn.Module) -> type:
    """The class with which ``module`` is traced: a site's floor, without an owner's forward."""
    if is_site(module):
        return converted_class(original_class(module), floor_recipe(module))
    return original_class(module)


def _structure(module: nn.Module, recipe: Recipe) -> Any:
    """What must be equal for two modules to share a graph, besides what their traces read."""
    sites = [
        (path, original_class(child), state.mode, state.group, has_hooks(child))
        for path, child in module.named_modules(remove_duplicate=False)
        if is_site(child) and (state := site_state(child))
    ]
    functional = tuple(
        recipe.modes.find(functional_name(recipe.name, index)) for index in range(_FUNCTIONAL)
    )
    return original_class(module), tuple(_children(module, "")), tuple(sites), functional


_FUNCTIONAL = 8
"""Functional sites of one owner whose modes are compared; modules with more are rare, and patterns
that tell the ninth from the eighth rarer."""


def _children(module: nn.Module, prefix: str) -> Iterator[tuple[str, type | None]]:
    for name, child in module._modules.items():
        yield prefix + name, None if child is None else original_class(child)
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from _children(child, f"{prefix}{name}.")


def _renamed(earlier: Capture, module: nn.Module, recipe: Recipe) -> Capture:
    def name_of(name: str, path: str | None) -> str:
        if path is not None:
            return site_state(module.get_submodule(path)).name
        if is_site(module):
            return site_state(module).name
        local = name.rpartition(".")[2]
        return f"{recipe.name}.{local}" if recipe.name else local

    reports = {
        name: report.renamed(recipe.name, name_of) for name, report in earlier.reports.items()
    }
    return dataclasses.replace(earlier, reports=reports)
