"""What the backward pass that runs now is for."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


def makes_gradients_of(modules: Iterable[nn.Module]) -> bool:
    """Whether the backward that runs now makes gradients of parameters of ``modules``.

    Where none of them can have one, others may train all the same.
    """
    parameters = {p for module in modules for p in module.parameters() if p.requires_grad}
    return not parameters or any(map(_makes_gradient, parameters))


def _makes_gradient(parameter: Tensor) -> bool:
    with torch.enable_grad():
        node = get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # So torch says that autograd.grad() was given this very parameter.
        return True
