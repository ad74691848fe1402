"""Making modules owners, and back; graphs of ``torch.fx`` are captured again when they change.

torch makes a class for each ``fx.GraphModule``, on which ``recompile`` puts the forward of the
graph as it is now: after a pass over the graph, or where evaluation has a graph of its own, as what
torchvision's ``create_feature_extractor`` makes.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from torch import fx, nn

from bnrewrite.capture.alike import forwards_alike
from bnrewrite.capture.cache import Cache, Recipe
from bnrewrite.capture.capture import capture
from bnrewrite.capture.functional import CALLS, TOLD, functional_calls
from bnrewrite.capture.owner import (
    STATE,
    OwnerForward,
    OwnerState,
    is_owner,
    owner_state,
    owner_state_of,
)
from bnrewrite.naming import ITSELF
from bnrewrite.sites.classes import (
    Converted,
    assign_class,
    change_class,
    original_class,
    restore_class,
)
from bnrewrite.sites.flags import GRAPH, LEFT
from bnrewrite.sites.floor import floor_recipe, is_site
from bnrewrite.sites.schedule import SCHEDULE, Schedule

_KNOWN = "_bnrewrite_known"
"""Attribute in which a graph module that was recompiled holds the graphs it had."""

_OF_ITS_OWN = (STATE, CALLS, SCHEDULE, GRAPH, _KNOWN)
"""Attributes that copies get by becoming owners; they keep others of ours."""


def attach_owner(
    module: nn.Module, state: OwnerState | None, schedule: Schedule, recipe: Recipe
) -> None:
    """Turns a module into an owner, in place; None leaves it on the floor with interception."""
    module.__dict__[STATE] = state
    sites = [] if state is None else state.train.functional_sites()
    left = state is not None and state.train.leaves_functions
    module.__dict__[CALLS] = functional_calls(module, recipe, sites, left)
    if is_site(module):
        bases = floor_recipe(module)
    elif isinstance(module, fx.GraphModule):
        bases = (_GraphModule, None)
    else:
        bases = (None,)
    change_class(module, (OwnerForward, *bases))
    schedule.enter(module)


def detach_owner(module: nn.Module) -> None:
    """Exact inverse of :func:`attach_owner`."""
    module.__dict__.pop(LEFT, None)
    if is_site(module):
        del module.__dict__[STATE]
        del module.__dict__[CALLS]
        change_class(module, floor_recipe(module))
        return
    restore_class(module)
    for name in _OF_ITS_OWN:
        module.__dict__.pop(name, None)


@dataclasses.dataclass(frozen=True)
class _Known:
    """A graph that a module had: its forward and what it was captured as."""

    number: int
    forward: Any
    state: OwnerState | None


class _GraphModule(Converted):
    """What an ``fx.GraphModule`` does with its class, for one that is converted."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A module of yet another class, which is not converted: copies begin so."""
        original = cls._bnrewrite_original
        return original.__new__(original, *args, **kwargs)

    def recompile(self) -> Any:
        """Gives the original class the forward of the graph, and captures that."""
        module: Any = self
        cls, original = type(module), original_class(module)
        before = original.forward
        # torch puts it on the class that it finds.
        assign_class(module, original)
        try:
            made = module.recompile()
        finally:
            assign_class(module, cls)
        if is_owner(module):
            _change_graph(module, before)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = super().__deepcopy__(memo)  # pyright: ignore[reportAttributeAccessIssue]
        vars(copied).update(copy.deepcopy(_kept(self), memo))
        return _make_owner(copied, _recipe_of(self), copy.deepcopy(vars(self)[SCHEDULE], memo))

    def __copy__(self) -> Any:
        copied = super().__copy__()  # pyright: ignore[reportAttributeAccessIssue]
        vars(copied).update(_kept(self))
        return _make_owner(copied, _recipe_of(self), vars(self)[SCHEDULE])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Of torch: code and attributes. The graph is traced anew.
        make, (attributes, *more), *rest = super().__reduce_ex__(protocol)
        others = {name: value for name, value in attributes.items() if name not in _OF_ITS_OWN}
        schedule = attributes[SCHEDULE]
        return (_load, (make, (others, *more), _recipe_of(self), schedule), *rest)


def _change_graph(module: Any, before: FunctionType) -> None:
    """Has the graph of an owner, whose forward was ``before``, stand for the forward as it is."""
    original: Any = original_class(module)
    made, held = original.forward, vars(module)
    known: dict[CodeType, _Known] = held.setdefault(_KNOWN, {})
    if not known:
        known[before.__code__] = _Known(0, before, owner_state(module))
    now = known.get(made.__code__)
    if now is None or not forwards_alike(now.forward, made):
        number = 1 + max(one.number for one in known.values())
        # Not that of another forward, if this is interrupted.
        state, held[STATE] = held[STATE], None
        now = _Known(number, made, _captured(module, _recipe_of(module, state)))
        known[made.__code__] = now
    # What has seen one graph meets it again.
    original.forward = now.forward
    held[STATE] = now.state
    if held.get(GRAPH, 0) != now.number:
        held[GRAPH] = now.number
        held[SCHEDULE].change()


def _captured(module: nn.Module, recipe: Recipe) -> OwnerState | None:
    found = capture(module, recipe, Cache())
    if found.refused is not None:
        warnings.warn(
            f"{recipe.name or ITSELF}: the graph as it is now cannot be captured again: it "
            f"{found.refused}. It runs as it is: its BatchNorm layers communicate one by one, and "
            f"so do {TOLD}; others use local statistics.",
            stacklevel=5,
        )
    return owner_state_of(recipe, found)


def _kept(module: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith("_bnrewrite_") and name not in _OF_ITS_OWN
    }


def _recipe_of(module: Any, state: OwnerState | None = None) -> Recipe:
    """How an owner was captured; ``state`` is that of its graph, if it does not hold it."""
    known = (one.state for one in vars(module).get(_KNOWN, {}).values())
    found = (state, owner_state(module), vars(module)[CALLS], *known)
    return next(one.recipe for one in found if one is not None)


def _make_owner(module: Any, recipe: Recipe, schedule: Schedule) -> Any:
    attach_owner(module, _captured(module, recipe), schedule, recipe)
    return module


def _load(make: Callable[..., Any], args: tuple, recipe: Recipe, schedule: Schedule) -> Any:
    return _make_owner(make(*args), recipe, schedule)
