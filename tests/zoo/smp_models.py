"""segmentation-models-pytorch: every decoder, on encoders of three kinds."""

import functools
from collections.abc import Iterator

from torch import nn

from tests.zoo.spec import Spec, images, prepare_torchvision, require

_ENCODERS = ("resnet18", "timm-regnetx_002", "mobilenet_v2", "timm-efficientnet-b0", "densenet121")


def specs() -> Iterator[Spec]:
    """Every decoder with every encoder of a few kinds that it accepts."""
    require("segmentation_models_pytorch")
    prepare_torchvision()
    import segmentation_models_pytorch as smp

    for decoder in sorted(smp.MODEL_ARCHITECTURES_MAPPING):
        yield from _of_decoder(decoder)


def _of_decoder(decoder: str) -> Iterator[Spec]:
    for encoder in ("mit_b0",) if decoder == "segformer" else _ENCODERS:
        make = functools.partial(_make, decoder, encoder)
        yield Spec("smp", f"{decoder}/{encoder}", make, images(128))


def _make(decoder: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.create_model(decoder, encoder, encoder_weights=None, classes=3)
