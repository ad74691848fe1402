"""Torchvision models for the benchmarks."""

import torch
from torch import nn

# Builds of torchvision without compiled ops want these schemas to exist before it is imported.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def torchvision_model(name: str, **options: object) -> nn.Module:
    """A model of torchvision by name, with random weights."""
    from torchvision.models import get_model

    return get_model(name, weights=None, **options)
