"""Calls of torch's BatchNorm functions: their arguments, and the op in their place."""

import dataclasses
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.groups import NO_GROUP, active_group
from bnrewrite.guards import is_compiling
from bnrewrite.modes import Frozen, Mode
from bnrewrite.naming import ITSELF
from bnrewrite.sites.evaluate import evaluate

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


@dataclasses.dataclass(frozen=True)
class Call:
    """The site that a call of one of :data:`FUNCTIONS` is: plain values, so it copies and pickles.

    Attributes:
        name: qualified name in the converted model.
        mode: the mode of the site.
        group: name of its process group, or "" if its mode does not communicate.
        number: of the site; random schedules of different sites differ by it.
    """

    name: str
    mode: Mode
    group: str
    number: int


class Intercept(TorchFunctionMode):
    """Sends ``F.batch_norm`` to the op while a forward runs that no graph stands for.

    What a checkpoint runs again, or an ``autograd.Function`` differentiates by itself, stays
    torch's, with a warning: their backward would not find the mode that was active in forward. So
    does a call for which a forward turns gradients off, as such a function does.

    Args:
        find: the site that a call is with this input, running mean and weight, and whether it asks
            for statistics of the batch; None if it is torch's.
        training: whether the module of the forward trains.
        of_site: whether that is a BatchNorm module, all of whose calls are its own.
    """

    def __init__(
        self,
        find: Callable[[Tensor, Tensor | None, Tensor | None, bool], Call | None],
        *,
        training: bool,
        of_site: bool,
    ) -> None:
        super().__init__()
        self._find = find
        self._training = training
        self._grad = None if of_site else torch.is_grad_enabled()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in FUNCTIONS:
            return func(*args, **kwargs)
        input, mean, var, weight, bias, training, momentum, eps = functional_arguments(
            func, args, kwargs
        )
        call = self._find(input, mean, weight, training)
        if call is None:
            return func(*args, **kwargs)
        if self._is_left_to_torch():
            if training and (call.group != NO_GROUP or isinstance(call.mode, Frozen)):
                _warn_of_left(call.name)
            return func(*args, **kwargs)
        training = training and not isinstance(call.mode, Frozen)
        group = active_group(call.group, self._training and training)
        arguments = (input, weight, bias, mean, var, None, training, True, momentum, eps)
        try:
            return evaluate(call.mode, call.number, group, arguments)
        except UnsupportedBatchNorm as error:
            raise UnsupportedBatchNorm(f"{call.name or ITSELF}: {error}") from error

    def _is_left_to_torch(self) -> bool:
        """Whether backward would run the code of this call again, or not at all."""
        # A Function runs without gradients.
        if self._grad is not None and torch.is_grad_enabled() is not self._grad:
            return True
        if is_compiling():
            # Checkpoints are compiled without the mode.
            return False
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code.co_name != _OWN_FORWARD:
            if frame.f_code.co_filename == _CHECKPOINT or _is_of_function(frame):
                return True
            frame = frame.f_back
        return False


_OWN_FORWARD = "_bnrewrite_own_forward"
"""Name of the function that runs a forward under an :class:`Intercept`."""

_PACKAGE = __name__.partition(".")[0]

_CHECKPOINT = torch.utils.checkpoint.__file__


def _is_of_function(frame: FrameType) -> bool:
    """Whether a frame is that of the forward of an ``autograd.Function``, by its first argument."""
    code, back = frame.f_code, frame.f_back
    called_by = "" if back is None else str(back.f_globals.get("__name__"))
    # Reading the locals of a frame may keep them alive: not where it is that of a module.
    if code.co_name != "forward" or called_by.startswith(("torch.nn.", f"{_PACKAGE}.")):
        return False
    return isinstance(frame.f_locals.get("".join(code.co_varnames[:1])), FunctionCtx)


@torch.compiler.assume_constant_result
def _warn_of_left(name: str) -> None:
    warnings.warn(
        f"{name or ITSELF}: this call of torch.nn.functional.batch_norm is inside a checkpoint, an "
        "autograd.Function or no_grad of a forward that runs as it is, without a graph. It behaves "
        "as in an unconverted model, with local statistics in training. Checkpoint the whole "
        "module, or use a BatchNorm module there.",
        stacklevel=3,
    )
