"""The pass ``replace_batch_norm``: every BatchNorm call becomes ``torch.ops.bnrewrite.batch_norm``.

    self.bn(x)                                       ->  batch_norm(x, self.bn.weight, ...)
    F.batch_norm(x, self.running_mean, ...)          ->  batch_norm(x, self.weight, ...)

Sites of mode ``Shuffle`` become ``shuffle_batch_norm``, with its additional arguments.
Flags and numbers of a BatchNorm module (``training``, ``momentum``, ``eps``) become attribute reads
in the graph, so changing them on the module still works. ``F.batch_norm`` on values that do not
depend on an argument of the forward standardizes weights; it is not a site and stays as it is. So
does what normalizes each sample by itself, see :mod:`bnrewrite.passes.each_sample`.
"""

import operator
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from torch import fx

from bnrewrite.groups import NO_GROUP, active_group, place_in
from bnrewrite.modes import Frozen, Mode, Shuffle, skips_nonfinite
from bnrewrite.naming import ITSELF
from bnrewrite.ops.batch_norm import BATCH_NORM
from bnrewrite.ops.shuffle_batch_norm import SHUFFLE_BATCH_NORM
from bnrewrite.passes.base import (
    UNMATCHED,
    Attribute,
    OwnerGraph,
    PassReport,
    Rewrite,
    Skip,
    where,
)
from bnrewrite.passes.each_sample import EACH_SAMPLE, is_of_each_sample
from bnrewrite.passes.nodes import call_function
from bnrewrite.sites.classes import below
from bnrewrite.sites.evaluate import shuffle_options
from bnrewrite.sites.floor import (
    SITE_TENSORS,
    checked_input,
    has_hooks,
    has_own_forward,
    is_site,
    is_uninitialized,
    own_batch_norm,
    site_state,
)
from bnrewrite.sites.intercept import FUNCTIONS, functional_arguments

LOCAL = "which uses local statistics: call F.batch_norm instead"
"""Ends the reason why a call that evaluates BatchNorm in some other way is no site."""


def replace_batch_norm(target: OwnerGraph, report: PassReport) -> None:
    """Replaces the BatchNorm calls of one owner's graph."""
    num_functional: Counter[int] = Counter()
    activations = _depends_on_arguments(target.graph)
    report.skipped.extend(_other_functions(target, activations))
    for node in _candidates(target, activations):
        scope = node.meta.get("scope", "")
        home = below(target.owner, scope)
        if node.op == "call_module":
            match = _match_module(target, node)
        elif is_site(home):
            path = scope if node.target is own_batch_norm else None
            state = site_state(home)
            match = _Site(state.name, path, state.mode, state.group, scope)
        else:
            # A forward that runs again makes the same calls again.
            call = node.meta.get("call", 0)
            match = _match_functional(target, node, scope, num_functional[call], activations)
            num_functional[call] += 1
        if isinstance(match, Skip):
            report.skipped.append(match)
            continue
        with target.graph.inserting_before(node):
            arguments = _arguments(target, node, match)
            if isinstance(match.mode, Shuffle):
                arguments += _shuffle_arguments(target, match, match.mode, group=arguments[-1])
                new = call_function(target.graph, SHUFFLE_BATCH_NORM, arguments)
            else:
                skip = skips_nonfinite(match.mode)
                new = call_function(target.graph, BATCH_NORM, (*arguments, skip))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        target.graph.erase_node(node)
        site = Rewrite(
            match.name, target.name, match.path, match.mode, where(new), match.index, match.tensor
        )
        new.meta["site"] = site
        report.rewritten.append(site)


class _Site:
    """A call to rewrite: ``path`` leads to its BatchNorm module, None for a functional call.

    ``group`` is that of the site, which a ``torch.nn.SyncBatchNorm`` may have brought along;
    ``scope`` leads to the module whose forward makes the call, and ``index`` counts the functional
    calls there; ``tensor`` leads to running statistics, or else to a weight, that tell such a call.
    """

    def __init__(
        self,
        name: str,
        path: str | None,
        mode: Mode,
        group: str,
        scope: str = "",
        index: int = 0,
        tensor: str | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.mode = mode
        self.group = group
        self.scope = scope
        self.index = index
        self.tensor = tensor


def _candidates(target: OwnerGraph, activations: Collection[fx.Node]) -> list[fx.Node]:
    """BatchNorm calls; a subclass with its own forward is an owner itself and stays a call."""
    functional = (*FUNCTIONS, own_batch_norm)
    return [
        node
        for node in target.graph.nodes
        if (node.op == "call_module" and _is_plain_site(target, str(node.target)))
        or (node.op == "call_function" and node.target in functional and node in activations)
    ]


def _other_functions(target: OwnerGraph, activations: Collection[fx.Node]) -> Iterator[Skip]:
    """Calls on activations of other functions that evaluate BatchNorm than those that are sites."""
    for node in target.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if (
            node.op == "call_function"
            and "batch_norm" in name
            and node.target not in (*FUNCTIONS, own_batch_norm)
            and node in activations
        ):
            reason = f"calls {name}, {LOCAL}"
            place = target.qualified(node.meta.get("scope", "")) or ITSELF
            yield target.skip(place, reason, node, None)


def _is_plain_site(target: OwnerGraph, path: str) -> bool:
    module = below(target.owner, path)
    return is_site(module) and not has_own_forward(module)


def _depends_on_arguments(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _match_module(target: OwnerGraph, node: fx.Node) -> _Site | Skip:
    path = str(node.target)
    module = below(target.owner, path)
    state = site_state(module)
    if is_uninitialized(module):
        reason = "it is lazy and not initialized yet: run one batch, then convert again"
        return target.skip(state.name, reason, node, path)
    if has_hooks(module):
        return target.skip(state.name, "it has hooks, which only a call would run", node, path)
    if len(node.args) + len(node.kwargs) != 1:
        return target.skip(state.name, "it is called with more than one argument", node, path)
    return _Site(state.name, path, state.mode, state.group)


def _match_functional(
    target: OwnerGraph, node: fx.Node, scope: str, index: int, activations: Collection[fx.Node]
) -> _Site | Skip:
    name = functional_name(target.qualified(scope), index)
    mode = target.modes.find(name)
    if mode is None:
        return target.skip(name, UNMATCHED, node, None)
    input, *vectors = functional_arguments(node.target, node.args, node.kwargs)[:5]
    if is_of_each_sample(input, vectors, activations):
        return target.skip(name, EACH_SAMPLE, node, None)
    if isinstance(mode, Frozen) and vectors[0] is None:
        return target.skip(name, "it has no running statistics to freeze", node, None)
    mean, _, weight, _ = vectors
    told = weight if mean is None else mean
    held = isinstance(told, fx.Node) and told.op == "get_attr"
    tensor = str(told.target) if held else None
    return _Site(name, None, mode, target.group, scope, index, tensor)


def functional_name(owner: str, index: int) -> str:
    """Qualified name of the ``index``-th ``F.batch_norm`` on activations in ``owner``'s forward."""
    name = "batch_norm" if index == 0 else f"batch_norm_{index}"
    return f"{owner}.{name}" if owner else name


def _arguments(target: OwnerGraph, node: fx.Node, site: _Site) -> tuple[Any, ...]:
    """Arguments of the op in the order of its schema, as nodes and constants."""
    graph = target.graph
    frozen = isinstance(site.mode, Frozen)
    if site.path is None:
        input, mean, var, weight, bias, training, momentum, eps = functional_arguments(
            node.target, node.args, node.kwargs
        )
        communicates = site.mode.communicates and target.training
        if site.mode.communicates:
            # The call itself may not ask for it, and train in evaluation.
            target.flags[site.scope, "training"] = target.training
        parameters = (weight, bias, mean, var, None)
        training, track = False if frozen else training, True
    else:
        input = node.args[0] if node.args else next(iter(node.kwargs.values()))
        prefix = f"{site.path}." if site.path else ""

        def attribute(name: str) -> Any:
            return Attribute(prefix + name)

        input = call_function(graph, checked_input, (attribute("_check_input_dim"), input))
        communicates = site.mode.communicates
        weight, bias, *running = SITE_TENSORS
        parameters = (
            graph.get_attr(prefix + weight),
            graph.get_attr(prefix + bias),
            *map(attribute, running),
        )
        training = False if frozen else attribute("training")
        track, momentum, eps = map(attribute, ("track_running_stats", "momentum", "eps"))
    group = NO_GROUP
    if communicates:
        group = call_function(graph, active_group, (site.group, training))
    return (input, *parameters, training, track, momentum, eps, group)


def _shuffle_arguments(
    target: OwnerGraph, site: _Site, mode: Shuffle, *, group: Any
) -> tuple[Any, ...]:
    """What ``shuffle_batch_norm`` takes besides the arguments of ``batch_norm``.

    Modules of one structure share a graph, so the number of the site is read at run time.
    """
    graph = target.graph
    number: Any = 0
    if group == NO_GROUP:
        place = place_in(NO_GROUP)
    else:
        place = call_function(graph, place_in, (group,))
        if mode.schedule == "random":
            path = site.scope if site.path is None else site.path
            prefix = f"{path}." if path else ""
            number = graph.get_attr(f"{prefix}_bnrewrite_number")
            if site.index:
                number = call_function(graph, operator.add, (number, site.index))
    return (place, number, *shuffle_options(mode))
