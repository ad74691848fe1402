"""What calls of torch's own layers and functions do, where somebody here relies on it.

Layers go by class, with all that their bases do; functions and methods by name, since one operation
has several homes: ``torch.add``, ``operator.add``, ``Tensor.add``. What is not listed may do
anything.
"""

import enum
import functools
from typing import Any

import torch
from torch import fx, nn


class Does(enum.Flag):
    """Properties of a call.

    Attributes:
        TENSOR: gives one tensor, of whatever it accepts.
        ARITHMETIC: gives one tensor if it is given one, and a number of numbers.
        FRESH: what it gives shares no memory with its arguments, unless it works in place.
        RANDOM: draws random numbers.
        HEAVY: its backward is work enough to hide a collective.
    """

    TENSOR = enum.auto()
    ARITHMETIC = enum.auto()
    FRESH = enum.auto()
    RANDOM = enum.auto()
    HEAVY = enum.auto()


_NOTHING_KNOWN = Does(0)

_LAYERS: tuple[tuple[Does, tuple[type[nn.Module], ...]], ...] = (
    (Does.TENSOR | Does.FRESH | Does.HEAVY, (nn.modules.conv._ConvNd, nn.Linear)),
    (Does.TENSOR | Does.FRESH, (
        nn.Bilinear, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
        nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.ReLU6,
        nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh,
        nn.Softmax, nn.PReLU, nn.Mish, nn.ELU,
    )),
    # They may give indices, too.
    (Does.FRESH, (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)),
    (Does.TENSOR, (nn.Upsample,)),
    (Does.RANDOM, (
        nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
        nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
        nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.RNNBase,
    )),
)  # fmt: skip

_FUNCTIONS: tuple[tuple[Does, str], ...] = (
    (Does.TENSOR | Does.FRESH | Does.HEAVY, "conv1d conv2d conv3d linear matmul mm bmm"),
    (
        Does.TENSOR | Does.FRESH,
        "cat concat stack relu relu6 silu gelu sigmoid tanh hardswish hardsigmoid leaky_relu "
        "softmax mean sum avg_pool2d adaptive_avg_pool2d",
    ),
    (Does.FRESH, "max_pool2d adaptive_max_pool2d"),
    (Does.ARITHMETIC | Does.FRESH, "add sub mul truediv div neg"),
    (Does.ARITHMETIC, "iadd isub imul"),
    (
        Does.RANDOM,
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout "
        "rrelu gumbel_softmax fractional_max_pool2d fractional_max_pool3d "
        "fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices "
        "scaled_dot_product_attention multi_head_attention_forward",
    ),
)

_BY_NAME = {name: does for does, names in _FUNCTIONS for name in names.split()}


def layer_does(cls: type[nn.Module]) -> Does:
    """What a call of a layer of torch's of class ``cls`` does."""
    found = _NOTHING_KNOWN
    if cls.__module__.startswith("torch.nn.modules."):
        for does, classes in _LAYERS:
            if issubclass(cls, classes):
                found |= does
    return found


def function_does(node: fx.Node) -> Does:
    """What the function or method that ``node`` calls does, besides writing in place."""
    return _named(name_of(node))


@functools.lru_cache(maxsize=256)
def _named(name: str) -> Does:
    # In place an operation does the same.
    found = _BY_NAME.get(name.removesuffix("_"), _NOTHING_KNOWN)
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if packet is not None and any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
        for overload in packet.overloads()
    ):
        found |= Does.RANDOM
    return found


def name_of(node: fx.Node) -> str:
    """The name of the function or method that ``node`` calls."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return target._opname
    return target if isinstance(target, str) else getattr(target, "__name__", "")
