"""Small models that tests train, convert and compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """The residual block of ResNets, with a projection where the shape changes."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.downsample = None
        if stride != 1 or num_in != num_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + identity)


class Reading(nn.Module):
    """A BatchNorm, and whatever ``how`` makes of its result and ``held``."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], held: Any = None) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.how = how
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, self.bn(x))


class ResidualNet(nn.Module):
    """Stem, two residual blocks and a head with a BatchNorm1d: seven sites.

    The projection of the second block does not depend on its other sites and shares a collective.
    It has eight input channels, since oneDNN's weight gradient of a 1x1 convolution with stride 2
    and 2 to 7 channels, channels-last, corrupts memory on processors without AVX-512 (torch 2.13).
    """

    NUM_SITES = 7
    NUM_ROUNDS = 6

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.layer1 = Block(width, width, 1)
        self.layer2 = Block(width, 2 * width, 2)
        self.neck = nn.BatchNorm1d(2 * width, affine=False)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.layer2(self.layer1(x))
        return self.head(self.neck(x.mean((2, 3))))


class Functional(nn.Module):
    """An owner whose forward calls ``F.batch_norm`` on an activation and standardizes a weight."""

    def __init__(self, num_channels: int = 3) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(num_channels, num_channels, 3))
        self.weight = nn.Parameter(torch.rand(num_channels) + 0.5)
        self.bias = nn.Parameter(torch.randn(num_channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.kernel.reshape(1, self.kernel.size(0), -1)
        kernel = F.batch_norm(rows, None, None, training=True).reshape_as(self.kernel)
        x = F.conv1d(x, kernel, padding=1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )


class ActivatedNorm(nn.BatchNorm2d):
    """A subclass whose forward calls torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), 0.1)


class FunctionalNorm(nn.BatchNorm2d):
    """A subclass whose forward calls ``F.batch_norm`` by itself, as timm's BatchNormAct2d does."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        use_batch = self.training or self.running_mean is None
        y = F.batch_norm(
            input,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            use_batch,
            factor,
            self.eps,
        )
        return F.relu(y)


def perturb(model: nn.Module, seed: int = 1) -> nn.Module:
    """``model`` with parameters and statistics that no default initialization gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight, module.bias, module.running_mean):
                    if tensor is not None:
                        noise = torch.randn(tensor.shape, generator=generator)
                        tensor.add_(0.3 * noise.to(tensor))
    return model
