"""Owners: modules whose forward runs a captured graph while that does the same as the original."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from bnrewrite.capture.cache import Cache, Capture, Recipe
from bnrewrite.capture.capture import capture
from bnrewrite.capture.captured import Captured
from bnrewrite.capture.errors import named_error
from bnrewrite.capture.forms import PLAIN, arguments_of, call_with
from bnrewrite.capture.functional import (
    FunctionalCalls,
    Search,
    lost_call,
    lost_to_fx,
    search_while_compiling,
    warn_of_lost,
)
from bnrewrite.differences import Line
from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.groups import NO_GROUP
from bnrewrite.guards import is_compiling
from bnrewrite.modes import Frozen
from bnrewrite.naming import ITSELF
from bnrewrite.passes.base import joined
from bnrewrite.passes.overlap_backward import waiting_convolutions
from bnrewrite.sites.classes import (
    Converted,
    below,
    is_converted,
    original_class,
)
from bnrewrite.sites.evaluate import site_number
from bnrewrite.sites.flags import LEFT
from bnrewrite.sites.floor import call_in_trace, is_site, site_state
from bnrewrite.sites.intercept import Call, Intercept
from bnrewrite.sites.schedule import (
    EVALUATES,
    EVERY_GROUP,
    Schedule,
    living_schedule,
)
from bnrewrite.sites.tracing import Tracing, tracer_here
from bnrewrite.torch_versions import is_fx_tracing

STATE = "_bnrewrite_owner"

_LEFT_ALONE = (
    "its own forward runs, because an argument of the call, a hook or another change rules out the "
    "graph; ranks may differ in this after a conversion with passes=()"
)


class OwnerState:
    """The captured graphs of one owner and how they came about.

    Copies share it, since graphs name attributes of whatever owner they run on. Pickles hold the
    recipe only, and capture again when the owner is loaded.
    """

    def __init__(self, recipe: Recipe, train: Captured, eval: Captured) -> None:
        self.recipe = recipe
        self.number = site_number(recipe.name)
        self.train = train
        self.eval = eval
        self.shares = any(form.shares for form in train.forms)
        read = [form.assumptions for one in (train, eval) for form in one.forms]
        self.asked = {path: place for one in read for path, place in one.asked.items()}

    @property
    def differs(self) -> bool:
        """Whether training and evaluation need graphs of their own."""
        return self.train is not self.eval

    def functional_names(self, captured: Captured) -> list[str]:
        """Names of the calls of ``F.batch_norm`` in a graph of the owner, and where they are."""
        names = []
        for site in captured.functional_sites():
            # Graphs are shared by modules of one structure, whose sites have names of their own.
            name = joined(self.recipe.name, site.name.removeprefix(f"{site.owner}."))
            names.append(f"{name} ({site.where})" if site.where else name)
        return names

    def lines(self, training: bool, *, is_site: bool, left: bool) -> list[tuple[str, Line]]:
        """What the ranks of a group must have in common about this owner.

        ``left``: it runs its own forward, although there is a graph for the call.
        """
        name = f"the graph of {self.recipe.name or ITSELF}"
        order = (_LEFT_ALONE,) if left else self.train.order()
        lines = [(EVERY_GROUP if training else NO_GROUP, (name, "; ".join(order)))]
        if is_site:
            return lines
        for site in self.train.functional_sites():
            # Graphs are shared by modules of one structure, whose sites have names of their own.
            name = joined(self.recipe.name, site.name.rpartition(".")[2])
            communicates = training and site.mode is not None and site.mode.communicates
            group = self.recipe.group if communicates else NO_GROUP
            said = f"{site.mode}, a call to F.batch_norm" if training else EVALUATES
            lines.append((group, (name, said)))
        return lines

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
    _bnrewrite_calls: FunctionalCalls | None
    _bnrewrite_schedule: Schedule

    @property
    def _bnrewrite_number(self) -> int:
        """What the graph reads as the number of its functional sites."""
        module: Any = self
        if is_site(module):
            return site_state(module).number
        return self._bnrewrite_owner.number  # pyright: ignore[reportOptionalMemberAccess]

    def _bnrewrite_lines(self) -> list[tuple[str, Line]]:
        """What the ranks of a group must have in common about this owner, and site if it is one."""
        module: Any = self
        own = super()._bnrewrite_lines() if is_site(module) else []  # pyright: ignore
        state, calls = self._bnrewrite_owner, self._bnrewrite_calls
        if state is None:
            return own + ([] if calls is None else list(calls.lines(module.training)))
        left = module.__dict__.get(LEFT, False)
        return own + state.lines(module.training, is_site=is_site(module), left=left)

    def _bnrewrite_equal_buffers(self, group: str) -> list[Tensor]:
        """Buffers that are equal on all ranks; those of functional calls may be anything."""
        module: Any = self
        return super()._bnrewrite_equal_buffers(group) if is_site(module) else []  # pyright: ignore

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The captured graph where it stands for this call, else the original forward."""
        module: Any = self
        if Tracing.tracer is not None and tracer_here() is not None:
            return call_in_trace(self, args, kwargs)
        if not is_compiling() and is_fx_tracing() and _are_symbols(args, kwargs):
            return self._bnrewrite_symbolically(args, kwargs)
        if not is_owner(module):
            if not isinstance(module, OwnerForward):
                # Somebody has kept the method from when it was converted.
                return type(module).forward(module, *args, **kwargs)
            # Made of a converted module's class, as slices of a Sequential are.
            return super().forward(*args, **kwargs)  # pyright: ignore
        frozen = is_site(module) and isinstance(site_state(module).mode, Frozen)
        training = module.training and not frozen
        captured, values = self._bnrewrite_choose(training, args, kwargs)
        if training:
            self._bnrewrite_note(captured, values)
            self._bnrewrite_schedule.before_collectives((args, kwargs))
        if captured is not None and values is not None:
            result = _run(captured, module, values)
        else:
            result = self._bnrewrite_own_forward(training, captured, args, kwargs)
        if not training:
            self._bnrewrite_schedule.after_evaluation(result)
        return result

    def _bnrewrite_symbolically(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The original forward, for ``torch.fx``: sites stay calls of their modules."""
        module: Any = self
        state = self._bnrewrite_owner
        functional = [] if state is None else state.functional_names(state.train)
        if functional:
            raise lost_to_fx(functional[0])
        calls = self._bnrewrite_calls
        find = functools.partial(lost_call, calls, module)
        with Intercept(find, training=False, of_site=False):
            if isinstance(args, fx.Proxy):
                # The root of the trace: all arguments are one symbol, and what must be given is.
                forward = original_class(module).forward
                names = arguments_of(forward, PLAIN)
                return call_with(forward, self, names, [args[i] for i in range(len(names))])
            return super().forward(*args, **kwargs)  # pyright: ignore

    def _bnrewrite_choose(
        self, training: bool, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Captured | None, tuple[Any, ...] | None]:
        """The graph for calls of this form, and its arguments; None if it does not stand for it."""
        module: Any = self
        state = self._bnrewrite_owner
        fits = None
        if state is not None:
            for captured in (state.train if training else state.eval).forms:
                values = captured.bind(args, kwargs)
                if values is None:
                    continue
                if captured.holds(module):
                    return captured, values
                fits = captured
        return fits, None

    def _bnrewrite_note(self, captured: Captured | None, values: tuple[Any, ...] | None) -> None:
        """Notes whether the module leaves a graph whose collectives its own forward has not."""
        state = self._bnrewrite_owner
        if state is None or not state.shares:
            return
        # A call that no form stands for may be one of those on other ranks.
        left = values is None and (captured is None or captured.shares)
        if is_compiling():
            _leave_while_compiling(self._bnrewrite_schedule.key, state.recipe.name, left)
        elif self.__dict__.get(LEFT, False) is not left:
            self.__dict__[LEFT] = left
            self._bnrewrite_schedule.change()

    def _bnrewrite_own_forward(
        self, training: bool, captured: Captured | None, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        module: Any = self
        original = super().forward  # pyright: ignore
        if not is_compiling():
            self._bnrewrite_warn_of_classes()
        if not is_site(module):
            state, calls = self._bnrewrite_owner, self._bnrewrite_calls
            if training and calls is not None:
                # What has no graph at all, conversion has said.
                lost = functools.partial(warn_of_lost, calls, module, captured, state is not None)
                search = Search(calls, module, None if state is None else lost)
                if is_compiling():
                    return search_while_compiling(original, search, calls, lost, args, kwargs)
                original = _intercepting(original, Intercept(search, training=True, of_site=False))
            if captured is None or not training or is_compiling():
                return original(*args, **kwargs)
            # What this rank computes in another order others might wait for.
            with waiting_convolutions(module, captured.graph):
                return original(*args, **kwargs)
        site = site_state(module)
        call = Call(site.name, site.mode, site.group, site.number)
        intercept = Intercept(lambda *_: call, training=training, of_site=True)
        original = _intercepting(original, intercept)
        was_training = module.training
        if was_training is training:
            return original(*args, **kwargs)
        # Without the schedule's knowledge: the ranks need not agree about what is soon undone.
        object.__setattr__(module, "training", training)
        try:
            return original(*args, **kwargs)
        finally:
            object.__setattr__(module, "training", was_training)

    def _bnrewrite_warn_of_classes(self) -> None:
        """Warns where the own forward asks for a class, for which graphs have the old answer."""
        module: Any = self
        state = self._bnrewrite_owner
        for path, place in () if state is None else state.asked.items():
            child = below(module, path)
            if is_converted(child):
                name = module._bnrewrite_owner.recipe.name
                kind = original_class(child).__name__
                warnings.warn(
                    f"{name or ITSELF} ({original_class(module).__name__}) runs its "
                    "own forward, because its graph does not cover a call like this one, and "
                    f"asks for the class of {joined(name, path) or 'itself'} ({place}). Conversion "
                    f"made that a subclass of {kind}, so the results of the forward may change. "
                    f"Use isinstance(..., {kind}), or compare the name of the class.",
                    stacklevel=5,
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore
        if isinstance(self._bnrewrite_owner, _Pickled):
            module: Any = self
            recipe = self._bnrewrite_owner.recipe
            module.__dict__[STATE] = owner_state_of(recipe, capture(module, recipe, Cache()))


def _intercepting(forward: Callable[..., Any], intercept: Intercept) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with intercept:
            return forward(*args, **kwargs)

    return run


def _are_symbols(args: Any, kwargs: Any) -> bool:
    """Whether ``torch.fx`` records symbols; other tracers set its flag, too, and so do we."""
    return isinstance(args, fx.Proxy) or any(
        isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))
    )


@torch.compiler.assume_constant_result
def _leave_while_compiling(key: str, name: str, left: bool) -> None:
    """Notes, when a graph is compiled, whether the owner of this name leaves its own there."""
    schedule = living_schedule(key)
    for member in [] if schedule is None else schedule.members():
        state = owner_state(member) if is_owner(member) else None
        if state is None or state.recipe.name != name:
            continue
        if member.__dict__.get(LEFT, False) is not left:
            member.__dict__[LEFT] = left
            schedule.change()  # pyright: ignore[reportOptionalMemberAccess]


def owner_state_of(recipe: Recipe, captured: Capture) -> OwnerState | None:
    """The state of an owner from a capture; None if there is no graph."""
    if captured.train is None or captured.eval is None:
        return None
    return OwnerState(recipe, captured.train, captured.eval)


def is_owner(module: nn.Module) -> bool:
    """Whether ``module`` runs a captured graph, or would if it could be captured."""
    return STATE in module.__dict__


def owner_state(module: nn.Module) -> OwnerState | None:
    """The captured graphs of an owner."""
    return module.__dict__[STATE]


def _run(captured: Captured, owner: nn.Module, values: tuple[Any, ...]) -> Any:
    try:
        return captured.run(owner, values)
    except UnsupportedBatchNorm as error:
        state = owner_state(owner)
        functional = [] if state is None else state.functional_names(captured)
        named = named_error(error, owner, captured, functional)
        if named is error:
            raise
        raise named from error
