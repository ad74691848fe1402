"""BatchNorm classes of random networks, for inputs of any number of dimensions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class AnyNorm(_BatchNorm):
    """A direct subclass without a forward of its own."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class ActivatedNorm(AnyNorm):
    """Adds an activation to what torch's forward returns."""

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), 0.1)


class OwnForwardNorm(AnyNorm):
    """Calls ``F.batch_norm`` by itself, as timm's BatchNormAct2d does."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        y = F.batch_norm(
            input,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            factor,
            self.eps,
        )
        return torch.tanh(y)


TORCH: dict[int, type[_BatchNorm]] = {
    0: nn.BatchNorm1d,
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}
CLASSES: dict[str, type[_BatchNorm]] = {
    "any": AnyNorm,
    "activated": ActivatedNorm,
    "own": OwnForwardNorm,
    "sync": nn.SyncBatchNorm,
}


def make_norm(spec: dict[str, Any], num_channels: int, num_dims: int) -> _BatchNorm:
    """The BatchNorm module that ``spec`` describes, for ``num_dims`` spatial dimensions."""
    cls = CLASSES.get(spec["cls"]) or TORCH[num_dims]
    norm = cls(
        num_channels,
        eps=spec["eps"],
        momentum=spec["momentum"],
        affine=spec["affine"] != "none",
        track_running_stats=spec["track"],
    )
    if spec["affine"] == "no bias":
        norm.register_parameter("bias", None)
    for parameter in norm.parameters():
        parameter.requires_grad_(spec["affine"] != "frozen")
    return norm
