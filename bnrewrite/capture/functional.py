"""Calls of ``F.batch_norm`` in forwards that run as they are: the floor below functional sites.

A BatchNorm module is distributed whatever code reaches it. A call of the function is where a graph
stands for the forward, and the trace has told activations from weights. Where none does, the
tensors of the call tell: running statistics that the module holds belong to activations, and so do
tensors that a traced call was given.
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from bnrewrite.capture.cache import Recipe, functional_modes
from bnrewrite.capture.candidates import has_forward, mentions_batch_norm, mentions_checkpoint
from bnrewrite.capture.frames import user_frame
from bnrewrite.differences import Line
from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.groups import NO_GROUP, active_group
from bnrewrite.guards import is_compiling, is_in_higher_order_op
from bnrewrite.modes import Frozen, Mode
from bnrewrite.naming import ITSELF
from bnrewrite.passes.base import Rewrite, joined
from bnrewrite.passes.replace_batch_norm import functional_name
from bnrewrite.sites.evaluate import site_number
from bnrewrite.sites.floor import is_site
from bnrewrite.sites.intercept import Call, Intercept
from bnrewrite.sites.schedule import EVALUATES

CALLS = "_bnrewrite_calls"
"""Attribute in which an owner holds its :class:`FunctionalCalls`."""

TOLD = "calls of torch.nn.functional.batch_norm with running statistics that the module holds"
"""The calls that need no graph to be known as sites."""


@dataclasses.dataclass(frozen=True)
class FunctionalCalls:
    """Which calls of ``F.batch_norm`` by the own forward of a module are sites, in plain values.

    Attributes:
        recipe: how the module was captured, or was to be.
        known: calls in its graph, by the path of a tensor that only these are given.
        other: any call with running statistics that the module holds; None where patterns give
            calls of the module different modes, since nobody knows which one it is.
        holders: paths of what may hold such running statistics: the module, what it contains
            without a forward, and BatchNorm modules.
        freezes: whether the mode of any of its calls is ``frozen``.
        shared_in: name of the group in which any of them communicates, or "".
        standardizes: whether its graph has calls that are no sites.
        checkpoints: whether the forward may have some of them in a checkpoint.
    """

    recipe: Recipe
    known: tuple[tuple[str, Call], ...]
    other: Call | None
    holders: tuple[str, ...]
    freezes: bool
    shared_in: str
    standardizes: bool
    checkpoints: bool

    def find(self, owner: nn.Module, mean: Tensor | None, weight: Tensor | None) -> Call | None:
        """The call with these running statistics and this weight; None if it is no site."""
        tensor = weight if mean is None else mean
        if tensor is None:
            return None
        for path, call in self.known:
            home, _, name = path.rpartition(".")
            # Reading a parametrized weight would compute it.
            for table in _tables(owner, home):
                if table.get(name) is tensor:
                    return call
        if mean is None or self.other is None:
            # It may standardize a weight.
            return None
        for path in self.holders:
            for table in _tables(owner, path):
                for held in table.values():
                    if held is mean:
                        return self.other
        return None

    def lines(self, training: bool) -> Iterator[tuple[str, Line]]:
        """What ranks must have in common about calls of a module without a graph."""
        if self.other is not None:
            communicates = training and self.other.mode.communicates
            said = f"{self.other.mode}, calls to F.batch_norm" if training else EVALUATES
            yield (self.recipe.group if communicates else NO_GROUP, (self.other.name, said))


class Search:
    """Finds the calls of one run of an owner's own forward.

    Args:
        calls: what tells them.
        owner: whose forward runs.
        lost: is given a reason for each one that may be a site and that nothing tells.

    Attributes:
        found: names of the calls that were found.
    """

    def __init__(
        self, calls: FunctionalCalls, owner: nn.Module, lost: Callable[[str], None] | None
    ) -> None:
        self.found: list[str] = []
        self._calls = calls
        self._owner = owner
        self._lost = lost

    def __call__(
        self, input: Tensor, mean: Tensor | None, weight: Tensor | None, training: bool
    ) -> Call | None:
        """The call with these tensors; None if it is torch's."""
        call = self._calls.find(self._owner, mean, weight)
        if call is not None:
            self.found.append(call.name)
        elif (
            training
            and self._lost is not None
            # Weights, and samples that are normalized by themselves, are one row.
            and not (self._calls.standardizes and input.size(0) == 1)
        ):
            self._lost("no tensor that the module holds tells it from others")
        return call

    @property
    def has_missed(self) -> bool:
        """Whether a call of the graph was not made, or made where nothing is intercepted."""
        return any(call.name not in self.found for _, call in self._calls.known)


def search_while_compiling(
    forward: Callable[..., Any],
    search: Search,
    calls: FunctionalCalls,
    lost: Callable[[str], None],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Runs a forward whose calls are intercepted as far as a compiler allows it.

    It allows no mode inside a checkpoint or ``torch.cond``, and drops those from around one.
    """
    if is_in_higher_order_op():
        lost("what Dynamo compiles inside a checkpoint or cond allows no mode that intercepts it")
        return forward(*args, **kwargs)
    with Intercept(search, training=True, of_site=False):
        result = forward(*args, **kwargs)
    if calls.checkpoints and search.has_missed:
        lost("it seems to be inside a checkpoint, where Dynamo compiles it as it is")
    return result


def functional_calls(
    module: nn.Module, recipe: Recipe, sites: list[Rewrite], left: bool
) -> FunctionalCalls | None:
    """What the own forward of ``module`` does with ``F.batch_norm``; None if it never calls it.

    Args:
        module: an owner, or one that could not be captured.
        recipe: how it was captured.
        sites: functional sites in its graph.
        left: whether that has calls that are no sites.
    """
    if is_site(module) or not mentions_batch_norm(module):
        return None

    def call(index: int, mode: Mode) -> Call:
        # A graph, which ranks beside this may run, counts the calls of a module from its number.
        number = site_number(recipe.name) + index
        name = functional_name(recipe.name, index)
        return Call(name, mode, recipe.group if mode.communicates else NO_GROUP, number)

    known = {
        site.tensor: call(site.index, site.mode)
        for site in sites
        # Children whose forwards are part of the graph have calls of their own.
        if site.tensor is not None and site.mode is not None and site.is_of_owner
    }
    modes = tuple(dict.fromkeys(functional_modes(recipe.name, recipe.modes)))
    (mode,) = modes if len(modes) == 1 else (None,)
    return FunctionalCalls(
        recipe,
        tuple(known.items()),
        None if mode is None else call(0, mode),
        tuple(_holders(module)),
        any(isinstance(one, Frozen) for one in modes),
        recipe.group if any(one is not None and one.communicates for one in modes) else NO_GROUP,
        left,
        mentions_checkpoint(module),
    )


def warn_of_lost(
    calls: FunctionalCalls, owner: nn.Module, captured: Any, has_graph: bool, reason: str
) -> None:
    """Warns of a call that is torch's, since ``owner`` runs its own forward.

    Args:
        calls: of the owner.
        owner: whose forward runs.
        captured: the graph for calls of this form, if there is one.
        has_graph: whether there is any.
        reason: why the call is not intercepted.
    """
    change = captured.left_because(owner) if captured and not is_compiling() else None
    why = change or (_NOT_COVERED if has_graph else _NO_GRAPH)
    _warn_of_lost(calls.recipe.name, calls.shared_in, calls.freezes, why, reason)


@torch.compiler.assume_constant_result
def _warn_of_lost(name: str, group: str, freezes: bool, why: str, reason: str) -> None:
    if not freezes and active_group(group, True) == NO_GROUP:
        return
    frame = user_frame()
    place = "" if frame is None else f" ({frame.f_code.co_filename}:{frame.f_lineno})"
    warnings.warn(
        f"{name or ITSELF} runs its own forward, because {why}. A call there to "
        f"torch.nn.functional.batch_norm{place} behaves as in an unconverted model, with local "
        f"statistics in training, since {reason}. Use a BatchNorm module there, or "
        f"{_WAYS_OUT.get(why, 'convert the model again after such a change')}.",
        stacklevel=_level_of(frame),
    )


_NO_GRAPH = "it could not be captured"

_NOT_COVERED = "its graph does not cover a call like this one"

_WAYS_OUT = {
    _NO_GRAPH: "make the forward traceable",
    _NOT_COVERED: (
        "call the model with the arguments that its forward declares, and leave optional ones out"
    ),
}


def _level_of(frame: FrameType | None) -> int:
    """``stacklevel`` of a warning of the caller that is about ``frame``."""
    level, here = 1, sys._getframe(1)
    while frame is not None and here is not frame and here.f_back is not None:
        level, here = level + 1, here.f_back
    return level


def _tables(owner: Any, path: str) -> tuple[dict[str, Any], ...]:
    """Buffers and parameters of the module at ``path``, unless it is gone since conversion."""
    for name in path.split(".") if path else ():
        owner = None if owner is None else owner._modules.get(name)
    return () if owner is None else (owner._buffers, owner._parameters)


def lost_call(
    calls: FunctionalCalls | None,
    owner: nn.Module,
    _: Tensor,
    mean: Tensor | None,
    weight: Tensor | None,
    __: bool,
) -> None:
    """Raises, in place of finding a call, where ``torch.fx`` records it.

    Raises:
        UnsupportedBatchNorm: the call is a site.
    """
    call = None if calls is None else calls.find(owner, mean, weight)
    if call is not None:
        raise lost_to_fx(call.name)


def lost_to_fx(name: str) -> UnsupportedBatchNorm:
    """The error for a call that ``torch.fx`` would trace as it is in an unconverted model."""
    return UnsupportedBatchNorm(
        f"{name}: torch.fx would trace this distributed call to F.batch_norm as torch's own. Trace "
        "bnrewrite.revert(model), or trace before convert().",
    )


def untraced_calls(modules: Iterable[nn.Module]) -> Iterator[str]:
    """Names of functional sites that forwards without a graph may have."""
    for module in modules:
        calls = vars(module).get(CALLS)
        if calls is not None and not calls.known and calls.other is not None:
            yield calls.other.name


def _holders(module: nn.Module, path: str = "") -> Iterator[str]:
    yield path
    for name, child in module._modules.items():
        if child is not None and (is_site(child) or not has_forward(child)):
            yield from _holders(child, joined(path, name))
