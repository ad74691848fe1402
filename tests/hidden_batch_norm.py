"""Helpers of a test: what evaluates a BatchNorm without being a method of the module."""

import torch
from torch import Tensor
from torch.nn.functional import batch_norm as renamed


def through_another_name(x: Tensor) -> Tensor:
    """Calls ``F.batch_norm`` by a name of its own."""
    return renamed(x, None, None, training=True)


def two_calls_away(x: Tensor) -> Tensor:
    """Calls what calls it."""
    return through_another_name(x)


def native(x: Tensor) -> Tensor:
    """Calls an operator below ``F.batch_norm``."""
    return torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0]


class Helper:
    """A class that is no module."""

    @staticmethod
    def call(x: Tensor) -> Tensor:
        """Calls what calls it."""
        return two_calls_away(x)
