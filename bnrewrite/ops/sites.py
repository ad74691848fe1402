"""What the BatchNorm ops share: their arguments, with the checks of these."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.kernels.statistics import Running

TENSORS = 4
"""Tensors that autograd is given for each site: x, weight, bias, residual."""

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Site(NamedTuple):
    """Arguments of one evaluation, as the op ``batch_norm`` takes them, and what follows it.

    ``residual`` and ``act``, an activation with its slope, are what the phases add to it. With
    ``residual_site`` the residual is the result of that earlier site of the same call.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool
    track_running_stats: bool
    momentum: float | None
    eps: float
    skip_nonfinite: bool = False
    residual: Tensor | None = None
    residual_site: int | None = None
    act: tuple[str, float] = ("identity", 0.0)

    @property
    def per_channel(self) -> tuple[Tensor | None, ...]:
        """Tensors with one value per channel."""
        return (self.weight, self.bias, self.running_mean, self.running_var)

    @property
    def running(self) -> Running:
        """What this evaluation moves."""
        if not (self.training and self.track_running_stats):
            return (None, None, None, self.momentum, False)
        tensors = (self.running_mean, self.running_var, self.num_batches_tracked)
        return (*tensors, self.momentum, self.skip_nonfinite)

    @property
    def has_epilogue(self) -> bool:
        """Whether anything follows the site."""
        followed = self.residual is not None or self.residual_site is not None
        return followed or self.act[0] != "identity"

    def arguments(self, group: str) -> tuple[Any, ...]:
        """Arguments of the op ``batch_norm``, which evaluates it without what follows."""
        return (*self[: self._fields.index("skip_nonfinite")], group, self.skip_nonfinite)

    def alone(self) -> "Site":
        """The site without what follows it."""
        return self._replace(residual=None, residual_site=None, act=("identity", 0.0))

    def check(self) -> None:
        """Raises ``UnsupportedBatchNorm`` if a size or dtype does not fit."""
        check(self.input, self.per_channel)


def prefers_recomputing(x: Tensor) -> bool:
    """Whether arithmetic is free where ``x`` is, so that a backward better computes than reads."""
    return x.is_cuda


def dense(input: Tensor) -> Tensor:
    """``input`` as the phases want it: contiguous or channels-last, its values in memory."""
    if input.is_neg():
        input = input.resolve_neg()
    return input.contiguous(memory_format=memory_format(input))


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last if ``x`` is laid out so, else contiguous."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def check(input: Tensor, per_channel: tuple[Tensor | None, ...]) -> None:
    """Raises ``UnsupportedBatchNorm`` if a size, dtype or device does not fit.

    Args:
        input: must be (N, C, *) of a floating dtype.
        per_channel: weight, bias, running_mean and running_var: (C,) each, or None.
    """
    if input.dim() < 2:
        raise UnsupportedBatchNorm(
            f"expected an input of shape (N, C, *), got {input.dim()} dimension(s): "
            f"{tuple(input.shape)}. Add the missing dimension with unsqueeze().",
            per_channel,
        )
    if input.dtype not in _FLOATS:
        raise UnsupportedBatchNorm(
            f"expected a floating-point input, got {input.dtype}. Convert it with .float().",
            per_channel,
        )
    shape = input.shape[1:2]
    # Kernels for GPUs take addresses; elsewhere torch refuses what is on another device.
    device = input.device if input.is_cuda else None
    for index, tensor in enumerate(per_channel):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise UnsupportedBatchNorm(
                f"{_PER_CHANNEL[index]} has shape {tuple(tensor.shape)} but the input has "
                f"{shape[0]} channels: {tuple(input.shape)}. Check the layer that feeds it.",
                per_channel,
            )
        if device is not None and tensor.device != device:
            raise UnsupportedBatchNorm(
                f"{_PER_CHANNEL[index]} is on {tensor.device} but the input is on {device}. Move "
                "the model or the input with .to().",
                per_channel,
            )
    if (per_channel[2] is None) != (per_channel[3] is None):
        raise UnsupportedBatchNorm(
            "only one of running_mean and running_var is given. Give both or neither.",
            per_channel,
        )


def join(vectors: list[Tensor]) -> Tensor:
    """One vector of all; a lone one itself."""
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def split(vector: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Inverse of :func:`join`."""
    return (vector,) if len(sizes) == 1 else vector.split(sizes)
