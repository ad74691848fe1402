"""Activations and their derivatives as device functions; see :mod:`bnrewrite.activations`."""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# Triton reads the annotations of a kernel as the types of its arguments.

import triton
import triton.language as tl


@triton.jit
def sigmoid(z: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(z: tl.tensor, slope: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The activation of ``z``; NaN stays NaN, which tl.maximum would not keep."""
    if ACTIVATION == "identity":
        return z
    elif ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "relu6":
        return tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, z, z * tl.cast(slope, z.dtype))
    elif ACTIVATION == "silu":
        return z * sigmoid(z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return z * sigmoid(2.0 * 0.7978845608028654 * (z + 0.044715 * z * z * z))
    else:
        tl.static_assert(ACTIVATION == "hardswish", "unknown activation")
        shifted = z + 3.0
        # Not a division, which is a call of a function in float64.
        return z * tl.where(shifted < 0, 0.0, tl.where(shifted > 6, 6.0, shifted)) * (1 / 6)


@triton.jit
def activation_backward(
    grad: tl.tensor, z: tl.tensor, slope: tl.tensor, ACTIVATION: tl.constexpr
) -> tl.tensor:
    """``grad`` times the derivative at ``z``; for the ReLUs, ``z`` may be the result instead."""
    if ACTIVATION == "identity":
        return grad
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, grad)
    elif ACTIVATION == "relu6":
        return tl.where((z <= 0) | (z >= 6), 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, grad, grad * tl.cast(slope, grad.dtype))
    elif ACTIVATION == "silu":
        part = sigmoid(z)
        return grad * part * (1.0 + z * (1.0 - part))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return grad * (cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif ACTIVATION == "gelu_tanh":
        # Far out it is 0 or 1 without rounding, and the cube of what is further is infinite.
        z = tl.where(z < -30.0, -30.0, tl.where(z > 30.0, 30.0, z))
        part = sigmoid(2.0 * 0.7978845608028654 * (z + 0.044715 * z * z * z))
        inner = 2.0 * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)
        return grad * part * (1.0 + z * (1.0 - part) * inner)
    else:
        tl.static_assert(ACTIVATION == "hardswish", "unknown activation")
        return tl.where(z <= -3, 0.0, tl.where(z < 3, grad * (z * (1 / 3) + 0.5), grad))
