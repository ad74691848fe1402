"""Calls of ``F.batch_norm`` in forwards that run as they are: the floor below functional sites.

A BatchNorm module is distributed whatever code reaches it. A call of the function is where a graph
stands for the forward, and the trace has told activations from weights. Where none does, the
tensors of the call tell: running statistics that the module holds belong to activations, and so do
tensors that a traced call was given.
"""

import dataclasses
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from bnrewrite.capture.cache import Recipe, functional_modes
from bnrewrite.capture.candidates import has_forward, mentions_batch_norm, mentions_checkpoint
from bnrewrite.differences import Line
from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.groups import NO_GROUP
from bnrewrite.modes import Mode
from bnrewrite.passes.base import Rewrite, joined
from bnrewrite.passes.replace_batch_norm import functional_name
from bnrewrite.sites.classes import below
from bnrewrite.sites.evaluate import site_number
from bnrewrite.sites.floor import is_site
from bnrewrite.sites.intercept import Call
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
        checkpoints: whether the forward may have some of them in a checkpoint.
    """

    recipe: Recipe
    known: tuple[tuple[str, Call], ...]
    other: Call | None
    holders: tuple[str, ...]
    checkpoints: bool

    def find(self, owner: nn.Module, mean: Tensor | None, weight: Tensor | None) -> Call | None:
        """The call with these running statistics and this weight; None if it is no site."""
        tensor = weight if mean is None else mean
        if tensor is None:
            return None
        for path, call in self.known:
            home, _, name = path.rpartition(".")
            if getattr(below(owner, home), name, None) is tensor:
                return call
        if mean is None or self.other is None:
            # It may standardize a weight.
            return None
        for path in self.holders:
            holder = below(owner, path)
            for held in (*holder._buffers.values(), *holder._parameters.values()):
                if held is mean:
                    return self.other
        return None

    def lines(self, training: bool) -> Iterator[tuple[str, Line]]:
        """What ranks must have in common about calls of a module without a graph."""
        if self.other is not None:
            communicates = training and self.other.mode.communicates
            said = f"{self.other.mode}, calls to F.batch_norm" if training else EVALUATES
            yield (self.recipe.group if communicates else NO_GROUP, (self.other.name, said))


def functional_calls(
    module: nn.Module, recipe: Recipe, sites: list[Rewrite]
) -> FunctionalCalls | None:
    """What the own forward of ``module`` does with ``F.batch_norm``; None if it never calls it.

    Args:
        module: an owner, or one that could not be captured.
        recipe: how it was captured.
        sites: functional sites in its graph.
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
    modes = set(functional_modes(recipe.name, recipe.modes))
    (mode,) = modes if len(modes) == 1 else (None,)
    other = None if mode is None else call(0, mode)
    return FunctionalCalls(
        recipe,
        tuple(known.items()),
        other,
        tuple(_holders(module)),
        mentions_checkpoint(module),
    )


def lost_call(
    calls: FunctionalCalls | None, owner: nn.Module, mean: Tensor | None, weight: Tensor | None
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
