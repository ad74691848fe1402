"""The pass ``inline_children``: children that could share collectives join their owner's graph.

    y = self.branch1(x) + self.branch2(x)      ->      the layers of both branches, side by side

A child is inlined only if it pays: if it communicates and something else in the graph that
communicates is independent of it. An inlined child remains a module. If it gets hooks, another
class, or anything else that the trace did not see, the original forward runs instead of the graph.
"""

from torch import fx, nn

from bnrewrite.modes import Sync
from bnrewrite.passes.base import OwnerGraph, PassReport, Rewrite
from bnrewrite.passes.effects import is_known_leaf
from bnrewrite.passes.rounds import communicates
from bnrewrite.passes.schedule import independent
from bnrewrite.sites.classes import below, original_class
from bnrewrite.sites.floor import has_hooks, has_own_forward, is_site, site_state


def inline_children(target: OwnerGraph, report: PassReport) -> None:
    """Traces through the children of one owner that share what is independent with others."""
    if not target.training or target.retrace is None:
        return
    wanted: set[str] = set()
    for path, node in _independent_calls(target).items():
        kept = _kept(target, path)
        if kept:
            report.skipped.append(target.skip(target.qualified(path), kept, node, path))
        else:
            wanted |= _subtree(target, path)
    if not wanted:
        return
    found = target.retrace(wanted)
    if found is None:
        return
    target.graph, through = found
    for path in sorted(wanted):
        name = target.qualified(path)
        if path in through:
            report.rewritten.append(Rewrite(name, target.name, path, None, None))
        else:
            report.skipped.append(target.skip(name, "its forward cannot be traced", None, path))


def _independent_calls(target: OwnerGraph) -> dict[str, fx.Node]:
    """Calls of children, by path, that are independent of something that communicates.

    They communicate themselves, or nobody knows what they do.
    """
    nodes = list(target.graph.nodes)
    communicating = [node for node in nodes if communicates(target.owner, node)]
    apart = independent(nodes, communicating)
    if not set(apart).intersection(communicating):
        apart = []
    calls = {
        str(node.target): node
        for node in apart
        if node.op == "call_module" and not is_known_leaf(below(target.owner, str(node.target)))
    }
    # What could not be traced by itself may be traceable with the arguments of its call here.
    for node in communicating:
        if node.op == "call_module" and any(
            f"{name}.".startswith(f"{target.qualified(str(node.target))}.")
            for name in target.untraced
        ):
            calls[str(node.target)] = node
    return calls


def _subtree(target: OwnerGraph, path: str) -> set[str]:
    """Paths of the modules to trace through, so that the child at ``path`` is part of the graph."""
    if _kept(target, path):
        return set()
    found = {path}
    for name, child in below(target.owner, path).named_children():
        if not is_known_leaf(child) and not (is_site(child) and not has_own_forward(child)):
            found |= _subtree(target, f"{path}.{name}")
    return found


def _kept(target: OwnerGraph, path: str) -> str:
    """Why the child at ``path`` must stay a call; "" if it need not."""
    module = below(target.owner, path)
    if target.keeps(path):
        return "it is listed in keep"
    if has_hooks(module):
        return "it has hooks, which only a call would run"
    if is_site(module) and not (
        has_own_forward(module) and isinstance(site_state(module).mode, Sync)
    ):
        return "it is a BatchNorm layer that evaluates itself"
    if original_class(module).__module__.startswith("torch.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, fx.GraphModule)
    ):
        return "it is one of torch's own modules, which are not traced"
    return ""
