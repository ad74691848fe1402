"""What one training step of a converted model evaluates, in order, and what it communicates."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from bnrewrite.capture.owner import OwnerState, is_owner, owner_state
from bnrewrite.ops.batch_norm_act import BATCH_NORM_ACT
from bnrewrite.ops.library import argument
from bnrewrite.ops.shared_batch_norm import FINISH_BATCH_NORM, START_BATCH_NORM
from bnrewrite.passes.base import Rewrite, joined
from bnrewrite.passes.overlap_collectives import is_work
from bnrewrite.passes.rounds import communication
from bnrewrite.roots import Roots
from bnrewrite.sites.classes import below
from bnrewrite.sites.floor import is_site, site_state


@dataclasses.dataclass(frozen=True)
class Round:
    """Site evaluations that one call makes, with at most one collective.

    Attributes:
        sites: names of the sites that are evaluated.
        owner: qualified name of the module whose graph makes the call; None if a BatchNorm module
            runs on its own.
        collectives_forward: collectives of its forward pass, with more than one rank: 0 or 1.
        collectives_backward: the same for its backward pass.
        hidden: whether other work runs while its collective is in flight.
        fused: for each site, what follows it and was fused into its call, e.g. ``"sum, relu"``; ""
            if nothing was.
    """

    sites: tuple[str, ...]
    owner: str | None
    collectives_forward: int
    collectives_backward: int
    hidden: bool = False
    fused: tuple[str, ...] = ("",)

    def fused_with(self, site: str) -> str:
        """What is fused into the call after the evaluation of ``site``."""
        return self.fused[self.sites.index(site)]


def rounds_of(module: nn.Module, roots: Roots) -> Iterator[Round]:
    """The rounds of a training step of ``module``, as far as graphs tell in their order."""
    state = running_state(module)
    if state is not None:
        yield from _rounds_of_graph(module, state, roots)
    elif is_site(module):
        if site_state(module).by_itself:
            return
        mode = site_state(module).mode
        backward = int(mode.communicates_backward)
        yield Round((roots.name_of(module),), None, int(mode.communicates), backward)
    else:
        # Nothing tells what its forward calls: each once, unless the graph of another does.
        found = _evaluated_below(module)
        called = {id(one) for other in found for one in _called_by(other)}
        for one in found:
            if id(one) not in called:
                yield from rounds_of(one, roots)


def _evaluated_below(module: nn.Module) -> list[nn.Module]:
    """The outermost of its descendants that run a graph or are sites, once each."""
    found = {id(one): one for child in module.children() for one in _outermost(child)}
    return list(found.values())


def _outermost(module: nn.Module) -> list[nn.Module]:
    """``module`` if it runs a graph or is a site, else those below it that do or are."""
    if running_state(module) is not None or is_site(module):
        return [module]
    return _evaluated_below(module)


def _called_by(module: nn.Module) -> Iterator[nn.Module]:
    """What runs as part of the graph of an owner, or of those that it calls."""
    state = running_state(module)
    if state is None:
        return
    for path in (*state.train.inlined, *state.train.sites):
        yield below(module, path)
    for node in state.train.graph.find_nodes(op="call_module"):
        for one in _outermost(below(module, str(node.target))):
            yield one
            yield from _called_by(one)


def running_state(module: nn.Module) -> OwnerState | None:
    """The graphs of an owner that a training step runs; None of any other module."""
    return owner_state(module) if is_owner(module) and left_because(module) is None else None


def left_because(module: nn.Module) -> str | None:
    """Why an owner runs its own forward in training, although it has a graph; None if it does not.

    As far as that does not depend on the arguments of a call.
    """
    state = owner_state(module) if is_owner(module) else None
    if state is None:
        return None
    reasons = [form.left_because(module) for form in state.train.forms]
    return None if None in reasons else reasons[0]


def _rounds_of_graph(owner: nn.Module, state: OwnerState, roots: Roots) -> Iterator[Round]:
    name = roots.name_of_owner(owner)
    for node in state.train.graph.nodes:
        if node.op == "call_module":
            yield from rounds_of(below(owner, str(node.target)), roots)
            continue
        sites = node.meta.get("sites") or ([node.meta["site"]] if "site" in node.meta else [])
        if not sites or node.target is FINISH_BATCH_NORM:
            continue
        found = communication(node)
        yield Round(
            tuple(_name(owner, name, site, roots) for site in sites),
            name,
            found.forward,
            found.backward,
            hidden=node.target is START_BATCH_NORM and _hides(node),
            fused=_fused(node, len(sites)),
        )


def _name(owner: nn.Module, name: str, site: Rewrite, roots: Roots) -> str:
    """Graphs are shared by modules of one structure, whose sites have names of their own."""
    home = owner if site.path is None else below(owner, site.path)
    if is_site(home):
        return roots.name_of(home)
    prefix = f"{site.owner}." if site.owner else ""
    return joined(name, site.name.removeprefix(prefix))


def _fused(node: fx.Node, num_sites: int) -> tuple[str, ...]:
    """What the evaluation of each site of ``node`` does besides."""
    columns: Any = [(None,) * num_sites, (-1,) * num_sites, ("identity",) * num_sites]
    if node.target is BATCH_NORM_ACT:
        columns = [(argument(node, "residual"),), (-1,), (argument(node, "activation"),)]
    elif node.target is START_BATCH_NORM:
        names = ("residual", "residual_site", "activation")
        columns = [argument(_end(node), name) for name in names]
    found = []
    for residual, other, activation in zip(*columns, strict=True):
        parts = ["sum"] if residual is not None or other >= 0 else []
        found.append(", ".join(parts if activation == "identity" else [*parts, activation]))
    return tuple(found)


def _end(start: fx.Node) -> fx.Node:
    """The node that waits for the collective that ``start`` launches."""
    return next(node for node in start.users if node.target is FINISH_BATCH_NORM)


def _hides(start: fx.Node) -> bool:
    """Whether anything but small change runs before the collective is waited for."""
    node = start.next
    end = _end(start)
    while node is not end:
        if is_work(node):
            return True
        node = node.next
    return False
