"""What one node of autograd leaves for another one that runs later in the same backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class HandOver:
    """Values between two nodes, for each backward that runs by itself.

    The node that leaves them asks :func:`runs` first, so that none are left that nobody takes.

    Args:
        nodes: the nodes that the later one makes gradients for; None for a leaf.
    """

    def __init__(self, nodes: Sequence[Any] = ()) -> None:
        self._left: dict[int, tuple[Any, list[tuple[Tensor, int]]]] = {}
        self.nodes = nodes

    def leave(self, values: Any, saved: list[Tensor]) -> None:
        """Leaves ``values``; ``saved`` are tensors of the forward, not to be changed meanwhile."""
        versions = [(tensor, tensor._version) for tensor in saved]
        self._left[torch._C._current_graph_task_id()] = values, versions

    def take(self) -> Any:
        """The values, or None if none were left.

        Raises:
            RuntimeError: a saved tensor was changed in place, as torch says of those it saves.
        """
        found = self._left.pop(torch._C._current_graph_task_id(), None)
        if found is None:
            return None
        values, versions = found
        for tensor, version in versions:
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a tensor of shape {tuple(tensor.shape)} is at version "
                    f"{tensor._version}, expected version {version}. It changed between two parts "
                    "of one backward pass; change it before or after the whole pass."
                )
        return values


def runs(node: Any) -> bool:
    """Whether the backward that runs now comes to ``node``, not a leaf; None is no node."""
    return node is not None and torch._C._will_engine_execute_node(node)
