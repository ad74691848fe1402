"""Rounds: collectives that run one after the other, and how few a graph can do with."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from torch import fx, nn

from bnrewrite.groups import active_group
from bnrewrite.ops.batch_norm import BATCH_NORM
from bnrewrite.ops.batch_norm_act import BATCH_NORM_ACT
from bnrewrite.ops.library import argument
from bnrewrite.ops.shared_batch_norm import START_BATCH_NORM
from bnrewrite.ops.shuffle_batch_norm import SHUFFLE_BATCH_NORM
from bnrewrite.passes.effects import Order
from bnrewrite.sites.classes import below
from bnrewrite.sites.floor import is_site, site_state


def group_of(node: fx.Node) -> str | None:
    """Name of the process group that a node of ``batch_norm`` communicates with, if it does."""
    if node.target is not BATCH_NORM:
        return None
    group = argument(node, "group")
    if isinstance(group, fx.Node) and group.target is active_group:
        return str(group.args[0])
    return None


def communicates(owner: nn.Module, node: fx.Node) -> bool:
    """Whether ``node`` may wait for other ranks in training."""
    if node.op != "call_module":
        return group_of(node) is not None
    module = below(owner, str(node.target))
    # Most calls are of layers without children.
    return any(
        is_site(child) and site_state(child).mode.communicates
        for child in (module.modules() if module._modules else (module,))
    )


class Communication(NamedTuple):
    """Collectives that one node of a training graph makes."""

    forward: int = 0
    backward: int = 0


def communication(node: fx.Node) -> Communication:
    """What one node of a training graph communicates by itself; a call of a module nothing."""
    if node.target is START_BATCH_NORM or group_of(node) is not None:
        return Communication(1, 1)
    if node.target is BATCH_NORM_ACT and isinstance(argument(node, "group"), fx.Node):
        return Communication(1, 1)
    if node.target is SHUFFLE_BATCH_NORM and isinstance(argument(node, "group"), fx.Node):
        return Communication(1, int(node.meta["site"].mode.communicates_backward))
    return Communication()


@dataclasses.dataclass(frozen=True)
class Levels:
    """When the collectives of a graph can run at the latest.

    Attributes:
        total: rounds of the longest chain of nodes that communicate: the minimum.
        latest: for each node the number of rounds that may have run after it at the latest,
            without making the whole longer.
    """

    total: int
    latest: dict[fx.Node, int]

    @classmethod
    def of(cls, order: Order, weight: Callable[[fx.Node], int]) -> "Levels":
        """The levels of a graph whose nodes issue ``weight`` collectives forward."""
        nodes = list(order.before)
        weights = {node: weight(node) for node in nodes}
        earliest: dict[fx.Node, int] = {}
        for node in nodes:
            beside = order.beside[node]
            level = max([earliest[source] for source in order.before[node] - beside], default=0)
            own = level + weights[node]
            earliest[node] = max(own, *[earliest[source] for source in beside]) if beside else own
        total = max(earliest.values(), default=0)
        rest = dict.fromkeys(nodes, 0)
        for node in reversed(nodes):
            after, own = rest[node], rest[node] + weights[node]
            for source in order.before[node]:
                needed = after if source in order.beside[node] else own
                if needed > rest[source]:
                    rest[source] = needed
        return cls(total, {node: total - rest[node] for node in nodes})
