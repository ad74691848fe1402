"""Capturing the modules of a whole model, children before their parents."""

import dataclasses

from torch import nn

from bnrewrite.capture.asking import asking_candidates, unanswered
from bnrewrite.capture.attach import attach_owner
from bnrewrite.capture.cache import Cache, Capture, Recipe
from bnrewrite.capture.candidates import (
    children_first,
    computes_itself,
    looks_above_itself,
    mentions_batch_norm,
    sharing_candidates,
)
from bnrewrite.capture.capture import capture
from bnrewrite.capture.forms import Form
from bnrewrite.capture.owner import owner_state_of
from bnrewrite.modes import Frozen, Local
from bnrewrite.passes.base import joined
from bnrewrite.passes.inline_children import inline_children
from bnrewrite.sites.classes import below, is_converted, original_class
from bnrewrite.sites.floor import has_own_forward, is_site, note_own_statistics, site_state
from bnrewrite.sites.schedule import Schedule


def capture_from_below(
    modules: dict[str, nn.Module],
    owners: dict[str, nn.Module],
    recipe: Recipe,
    cache: Cache,
    schedule: Schedule,
) -> dict[str, Capture]:
    """Captures the owners, and the modules whose children may share collectives, children first.

    Args:
        modules: those of a model by qualified name; captured ones run their graphs from now on.
        owners: modules that may own a site, by qualified name.
        recipe: what to do, but for the names.
        cache: captures made so far; it is added to.
        schedule: of the conversion; what is captured enters it.

    Returns:
        What came of each module by name, children last.
    """
    found: dict[str, Capture] = {}
    shares = inline_children.__name__ in recipe.passes
    sharing = sharing_candidates(modules, owners) if shares else {}
    asking = asking_candidates(modules, owners)
    untraced: set[str] = set()
    names = {id(module): name for name, module in modules.items()}
    for name, module in children_first(modules):
        if name not in owners and name not in sharing and name not in asking:
            continue
        named = dataclasses.replace(recipe, name=name, untraced=tuple(sorted(untraced)))
        one = found[name] = capture_and_attach(module, named, cache, schedule)
        if one.train is not None:
            inlined = (below(module, path) for path in one.train.inlined)
            untraced.difference_update(names.get(id(child), "") for child in inlined)
        elif one.refused is not None and name in sharing:
            untraced.add(name)
    _capture_other_forms(modules, found, recipe, cache, schedule)
    return dict(reversed(found.items()))


def _capture_other_forms(
    modules: dict[str, nn.Module],
    found: dict[str, Capture],
    recipe: Recipe,
    cache: Cache,
    schedule: Schedule,
) -> None:
    """Captures owners again that others call with optional arguments, with these."""
    names = {id(module): name for name, module in modules.items()}
    forms: dict[str, list[Form]] = {}
    for name, one in found.items():
        for path, form in one.calls:
            # The caller may know it by another name.
            own_name = names.get(id(below(modules[name], path)), joined(name, path))
            known = forms.setdefault(own_name, [])
            if form not in known:
                known.append(form)
    for name in forms:
        if name in found and found[name].train is not None:
            named = dataclasses.replace(recipe, name=name, forms=tuple(forms[name]))
            found[name] = capture_and_attach(modules[name], named, cache, schedule)


def capture_and_attach(
    module: nn.Module, recipe: Recipe, cache: Cache, schedule: Schedule
) -> Capture:
    """Captures one module and makes it an owner if it owns a site, or shares those below it."""
    captured = capture(module, recipe, cache)
    state = owner_state_of(recipe, captured)
    if captured.only_asks:
        return dataclasses.replace(captured, recipe=recipe)
    runs_as_it_is = has_own_forward(module) if is_site(module) else _may_call(module, captured)
    if state is not None or runs_as_it_is:
        attach_owner(module, state, schedule, recipe)
    if is_site(module) and has_own_forward(module) and _has_no_site(module, captured):
        note_own_statistics(module)
    return captured


def _may_call(module: nn.Module, captured: Capture) -> bool:
    """Whether a module that cannot be captured may call ``F.batch_norm``."""
    return (
        captured.refused is not None
        and mentions_batch_norm(module)
        and not looks_above_itself(module)
    )


def _has_no_site(module: nn.Module, captured: Capture) -> bool:
    """Whether a BatchNorm with a forward of its own leaves nothing to distribute in its mode."""
    mode = site_state(module).mode
    if isinstance(mode, Local) or captured.train is not None:
        # What it computes is the local result, whatever that is.
        return False
    if captured.plain is None:
        return computes_itself(module)
    if isinstance(mode, Frozen) and captured.plain.assumptions.reads_training:
        # It runs as in evaluation, which has not been traced.
        return computes_itself(module)
    return not any(report.skipped for report in captured.reports.values())


@dataclasses.dataclass(frozen=True)
class Unanswered:
    """A forward that runs as it is, and asks for the class of a module, which is another one now.

    Attributes:
        name: qualified name of the module of the forward; "" is the model itself.
        child: qualified name of the module that it asks about.
        cls: the class that this had.
        where: file and line of the question.
        reason: why there is no graph.
    """

    name: str
    child: str
    cls: type
    where: str
    reason: str


def answer_questions(
    modules: dict[str, nn.Module], found: dict[str, Capture], schedule: Schedule
) -> list[Unanswered]:
    """Has graphs stand for forwards that only ask for classes which conversion has changed.

    Args:
        modules: those of a model by qualified name, converted.
        found: what came of capturing them.
        schedule: of the conversion; new owners enter it.

    Returns:
        Forwards that ask and have no graph.
    """
    left: list[Unanswered] = []
    for name, module in reversed(modules.items()):
        one = found.get(name)
        if one is None:
            continue
        if one.recipe is not None:
            if any(path and is_converted(below(module, path)) for path in one.asked):
                attach_owner(module, owner_state_of(one.recipe, one), schedule, one.recipe)
            continue
        reason = one.refused or one.unanswered
        question = None if reason is None else unanswered(module, one.asked)
        if reason is not None and question is not None:
            path, where = question
            cls = original_class(below(module, path))
            left.append(Unanswered(name, joined(name, path), cls, where, reason))
    return left[::-1]
