"""Capturing one module: trace its forward, run the passes, make the graph callable."""

import copy
import dataclasses
import inspect
from collections.abc import Collection, Iterator

from torch import fx, nn

from bnrewrite.capture.asking import may_ask
from bnrewrite.capture.cache import Cache, Capture, Recipe
from bnrewrite.capture.captured import Captured
from bnrewrite.capture.forms import PLAIN, Form, Refused, arguments_of, num_positional
from bnrewrite.capture.splice import spliced
from bnrewrite.capture.tracer import OwnerTracer
from bnrewrite.passes import run_optimizing, run_required
from bnrewrite.passes.base import OwnerGraph, PassReport, joined
from bnrewrite.passes.nodes import copied
from bnrewrite.sites.classes import (
    assign_class,
    below,
    converted_class,
    has_forward_of_its_own,
    original_class,
)
from bnrewrite.sites.floor import floor_recipe, is_site


def capture(module: nn.Module, recipe: Recipe, cache: Cache) -> Capture:
    """Captures the forward of ``module`` for training and evaluation, and rewrites the graphs.

    Args:
        module: the module; it is left as it was.
        recipe: its name and what to do.
        cache: captures made so far with the same recipe but for the name; it is added to.
    """
    if has_forward_of_its_own(module):
        return Capture(None, None, {}, "its forward was replaced on the instance")
    return cache.capture(module, recipe, lambda module, recipe: _capture(module, recipe, cache))


def _capture(module: nn.Module, recipe: Recipe, cache: Cache) -> Capture:
    flags = {child: child.training for child in module.modules() if "training" in child.__dict__}
    try:
        found = _capture_form(module, recipe, flags, PLAIN, cache)
        forms = list(recipe.forms)
        if found.eval is not None and found.eval.tensor_arguments:
            forms.append(Form(lists=True))
        for form in forms:
            found = _with_form(found, _capture_form(module, recipe, flags, form, cache))
    finally:
        for child, training in flags.items():
            child.__dict__["training"] = training
    return found


def _capture_form(
    module: nn.Module, recipe: Recipe, flags: dict[nn.Module, bool], form: Form, cache: Cache
) -> Capture:
    """Graphs for one form of call."""
    try:
        train, reports = _trace(module, recipe, flags, training=True, form=form)
        owns_site = any(report.rewritten for report in reports.values())
        calls = tuple(_calls_with_options(module, train.graph))
        optimized, more = _optimize(module, recipe, flags, train, form, cache)
        reports |= more
        gains = owns_site or optimized is not train
        read = train.assumptions
        none = Capture(None, None, reports, assumptions=read, calls=calls, plain=train)
        if not gains and not may_ask(module) and not read.asked:
            return none
        eval = train
        if read.reads_training:
            try:
                eval, _ = _trace(module, recipe, flags, training=False, form=form)
            except Refused as refused:
                if gains:
                    raise
                read = refused.assumptions
                return dataclasses.replace(none, assumptions=read, unanswered=str(refused))
            if eval.same_as(train):
                eval = train
        if not gains and not read.asked.keys() | eval.assumptions.asked.keys() - {""}:
            return none
        for one in {id(one): one for one in (optimized, eval)}.values():
            one.finish(module)
    except Refused as refused:
        return Capture(None, None, {}, str(refused), refused.assumptions)
    return Capture(optimized, eval, reports, calls=calls, plain=train, only_asks=not gains)


def _calls_with_options(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, Form]]:
    """Calls of children that are given optional arguments, as far as the graph tells."""
    for node in graph.find_nodes(op="call_module"):
        if len(node.args) + len(node.kwargs) < 2:
            continue
        path = str(node.target)
        forward = original_class(below(module, path)).forward
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        names = [parameter.name for parameter in parameters]
        values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        given = tuple(
            one.name
            for one in parameters
            if one.default is not one.empty and isinstance(values.get(one.name), fx.Node)
        )
        if given:
            yield path, Form(given=given)


def _with_form(first: Capture, other: Capture) -> Capture:
    """Both in one; what the passes did with the first one is what they did with the other.

    Where no graph takes a form, calls of it run the original forward.
    """
    train, eval = first.train, first.eval
    if train is None or eval is None or other.train is None or other.eval is None:
        return first
    more = dataclasses.replace(train, otherwise=_last(train.otherwise, other.train))
    if eval is train and other.eval is other.train:
        return dataclasses.replace(first, train=more, eval=more)
    eval = dataclasses.replace(eval, otherwise=_last(eval.otherwise, other.eval))
    return dataclasses.replace(first, train=more, eval=eval)


def _last(forms: Captured | None, form: Captured) -> Captured:
    if forms is None:
        return form
    return dataclasses.replace(forms, otherwise=_last(forms.otherwise, form))


def _trace(
    module: nn.Module,
    recipe: Recipe,
    flags: dict[nn.Module, bool],
    *,
    training: bool,
    form: Form,
    through: Collection[str] = (),
) -> tuple[Captured, dict[str, PassReport]]:
    """The graph of ``module``'s forward with its BatchNorm calls replaced."""
    tracer = OwnerTracer(through, form=form)
    for child in flags:
        child.__dict__["training"] = training
    traced = [module, *(below(module, path) for path in through)]
    classes = [type(one) for one in traced]
    for one in traced:
        assign_class(one, _without_owner(one))
    try:
        graph = tracer.trace(module)
    finally:
        for one, cls in zip(traced, classes, strict=True):
            assign_class(one, cls)
    # What holds the module trains when it does.
    holders = [
        one
        for one in tracer.reads.apart.flags.values()
        if one not in flags and any(module is inside for inside in one.modules())
    ]
    if holders:
        flags.update({one: one.training for one in holders})
        return _trace(module, recipe, flags, training=training, form=form, through=through)
    forward = original_class(module).forward
    asked = [
        index
        for index, node in enumerate(graph.find_nodes(op="placeholder"))
        if node.name in tracer.asked
    ]
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    captured = Captured(
        graph=graph,
        training=training,
        arguments=arguments_of(forward, form),
        defaults={
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.default is not parameter.empty and parameter.name not in form.given
        },
        names=[
            parameter.name
            for parameter in parameters
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ],
        num_positional=num_positional(forward),
        tensor_arguments=[] if form.lists else asked,
        list_arguments=asked if form.lists else [],
        compares_arguments=bool(tracer.compared),
        elements=list(tracer.elements.values()),
        assumptions=tracer.assumptions,
    )
    target = _target(module, recipe, captured)
    reports = run_required(target)
    for path, _ in target.flags:
        captured.assumptions.note_training(path, training)
    return captured, reports


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


def _optimize(
    module: nn.Module,
    recipe: Recipe,
    flags: dict[nn.Module, bool],
    plain: Captured,
    form: Form,
    cache: Cache,
) -> tuple[Captured, dict[str, PassReport]]:
    """What the optimizing passes make of a training graph; the graph itself if they gain nothing.

    Without a gain nothing is inlined either.
    """
    latest = plain

    def graph_of(path: str) -> Captured | None:
        child = dataclasses.replace(recipe, name=joined(recipe.name, path), forms=())

        def make(module: nn.Module, recipe: Recipe) -> Captured | None:
            try:
                return _trace(module, recipe, flags, training=True, form=PLAIN)[0]
            except Refused:
                return None

        return cache.plain(below(module, path), child, make)

    def retrace(through: set[str]) -> tuple[fx.Graph, set[str]] | None:
        nonlocal latest
        inside = spliced(plain, module, recipe.name, through, graph_of)
        if inside is not None:
            latest = inside
            return latest.graph, through
        while through:
            try:
                latest, _ = _trace(module, recipe, flags, training=True, form=form, through=through)
            except Refused as refused:
                lost = {path for path in through if f"{path}.".startswith(f"{refused.scope}.")}
                if not lost:
                    return None
                through = through - lost
            else:
                return latest.graph, through
        return None

    # Passes change graphs with sites in place, and the plain one stays in use.
    own = copied(plain.graph) if any(plain.site_calls()) else plain.graph
    target = _target(module, recipe, dataclasses.replace(plain, graph=own))
    target.retrace = retrace
    reports = run_optimizing(target, recipe.passes)
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
    optimized = dataclasses.replace(
        latest,
        graph=target.graph,
        assumptions=assumptions,
        tensor_arguments=sorted({*latest.tensor_arguments, *tensors}),
    )
    return optimized, reports


def _without_owner(module: nn.Module) -> type:
    """The class with which ``module`` is traced: a site's floor, without an owner's forward."""
    if is_site(module):
        return converted_class(original_class(module), floor_recipe(module))
    return original_class(module)
