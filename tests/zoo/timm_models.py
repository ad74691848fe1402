"""timm: every model of ``timm.list_models()``."""

import functools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.models import prepare_torchvision
from tests.zoo.spec import Call, Spec, require


def specs() -> Iterator[Spec]:
    """Every model of timm; those without BatchNorm are for the caller to leave out."""
    require("timm", "torchvision")
    prepare_torchvision()
    import timm

    for name in timm.list_models():
        make = functools.partial(timm.create_model, name)
        family = timm.models.model_entrypoint(name).__module__
        yield Spec("timm", name, make, _images, family=family)


def _images(model: Any, n: int) -> Call:
    size = model.default_cfg.get("input_size", (3, 224, 224))
    return (torch.rand(n, *size),), {}
