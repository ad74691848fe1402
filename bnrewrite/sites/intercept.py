"""Calls of torch's BatchNorm functions: their arguments, and the op in their place."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.groups import active_group
from bnrewrite.sites.evaluate import evaluate
from bnrewrite.sites.floor import site_state

_ORDER = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

_ATEN_ORDER = ("input", "weight", "bias", "running_mean", "running_var", *_ORDER[5:])

FUNCTIONS: dict[Any, tuple[str, ...]] = {
    torch.nn.functional.batch_norm: _ORDER,
    torch.batch_norm: _ATEN_ORDER,
    torch.ops.aten.batch_norm: _ATEN_ORDER,
    torch.ops.aten.batch_norm.default: _ATEN_ORDER,
}
"""torch's functions that evaluate a BatchNorm, with the names of their arguments in order."""


def functional_arguments(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Arguments of a call of one of :data:`FUNCTIONS` with the defaults filled in.

    Order: input, running_mean, running_var, weight, bias, training, momentum, eps.
    """
    values = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    values.update(zip(FUNCTIONS[function], args, strict=False))
    values.update(kwargs)
    return tuple(values[name] for name in _ORDER)


class Intercept(TorchFunctionMode):
    """Sends ``F.batch_norm`` to the op while the own forward of a BatchNorm subclass runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._state = site_state(module)
        self._training = module.training

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in FUNCTIONS:
            return func(*args, **kwargs)
        state = self._state
        input, mean, var, weight, bias, training, momentum, eps = functional_arguments(
            func, args, kwargs
        )
        group = active_group(state.group, self._training and training)
        arguments = (input, weight, bias, mean, var, None, training, True, momentum, eps)
        try:
            return evaluate(state.mode, state.number, group, arguments)
        except UnsupportedBatchNorm as error:
            raise state.named(error) from error
