"""The activations that can be fused into a normalization, by name.

A name stands for torch's function of the same name; ``gelu_tanh`` is ``gelu`` with
``approximate="tanh"``, and ``identity`` means no activation. Only ``leaky_relu`` uses ``slope``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten

ACTIVATIONS = (
    "identity",
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardswish",
)

_RESULT_KEPT = ("identity", "relu")


def check_activation(activation: str) -> None:
    """Refuses what no kernel knows.

    Raises:
        ValueError: an unknown name.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}. Known activations: {', '.join(ACTIVATIONS)}."
        )


def torch_keeps_result(activation: str) -> bool:
    """Whether torch itself keeps no more than the result for the backward.

    Of other activations it keeps the argument, so that the result may change in place afterwards.
    """
    return activation in _RESULT_KEPT


def activate(z: Tensor, activation: str, slope: float) -> Tensor:
    """The activation of ``z``, any shape and floating dtype; ``z`` itself for ``identity``."""
    if activation == "relu":
        return F.relu(z)
    if activation == "relu6":
        return F.relu6(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, slope)
    if activation == "silu":
        return F.silu(z)
    if activation.startswith("gelu"):
        return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "hardswish":
        return F.hardswish(z)
    return z


def activate_(z: Tensor, activation: str, slope: float) -> None:
    """As :func:`activate`, in place."""
    if activation == "relu":
        z.relu_()
    elif activation == "relu6":
        _aten.hardtanh_(z, 0, 6)
    elif activation == "leaky_relu":
        _aten.leaky_relu_(z, slope)
    elif activation == "silu":
        _aten.silu_(z)
    elif activation.startswith("gelu"):
        _aten.gelu_(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation == "hardswish":
        _aten.hardswish_(z)


def activation_backward(grad: Tensor, z: Tensor, activation: str, slope: float) -> Tensor:
    """``grad`` times the derivative at ``z``, differentiable in both.

    Of ``relu``, ``z`` may be the result instead.
    """
    if activation == "relu":
        return _aten.threshold_backward(grad, z, 0)
    if activation == "relu6":
        return _aten.hardtanh_backward(grad, z, 0, 6)
    if activation == "leaky_relu":
        return _aten.leaky_relu_backward(grad, z, slope, False)
    if activation == "silu":
        if not (torch.is_grad_enabled() and (grad.requires_grad or z.requires_grad)):
            return _aten.silu_backward(grad, z)
        # That op has no derivative.
        part = torch.sigmoid(z)
        return grad * (part * (1 + z * (1 - part)))
    if activation.startswith("gelu"):
        return _aten.gelu_backward(
            grad, z, approximate="tanh" if activation == "gelu_tanh" else "none"
        )
    if activation == "hardswish":
        return _aten.hardswish_backward(grad, z)
    return grad
