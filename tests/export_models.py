"""Models and helpers that several tests of the export share."""

import collections
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two convolutions, a residual, a mean and a linear layer."""

    def __init__(self, channels: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


class Mixed(nn.Module):
    """float16 convolutions, BatchNorm of every kind in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3).half()
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1).half()
        self.bn2 = nn.BatchNorm2d(4, affine=False)
        self.bn3 = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.bn2(self.conv2(x)) + self.bn2(x))


def randomize(model: Any, seed: int = 0) -> Any:
    """Running statistics and affine parameters that are neither zero nor one."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2, generator=generator)
    return model


def random_image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 8, 9), generator=torch.Generator().manual_seed(1))


def operators(model: onnx.ModelProto) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in model.graph.node))


def initializers(model: onnx.ModelProto) -> dict[str, Tensor]:
    return {
        one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy())
        for one in model.graph.initializer
    }
