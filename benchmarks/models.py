"""Torchvision models, for the benchmarks and for the tests."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

_LIBRARIES: list[torch.library.Library] = []


def prepare_torchvision() -> None:
    """Makes ``import torchvision`` work where its compiled library does not fit torch's build.

    Its Python part registers fake kernels of two operators that only the library defines. Their
    schemas are enough: no model calls them.
    """
    found = importlib.util.find_spec("torchvision")
    if _LIBRARIES or found is None or found.origin is None:
        return
    for library in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except (ImportError, OSError):
            continue
    _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _LIBRARIES[0].define(schema)


def torchvision_model(name: str, **options: object) -> nn.Module:
    """A model of torchvision by name, with random weights."""
    prepare_torchvision()
    from torchvision.models import get_model

    return get_model(name, weights=None, **options)
