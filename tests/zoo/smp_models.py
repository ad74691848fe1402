"""segmentation-models-pytorch: every decoder, on encoders of three kinds."""

import functools
from collections.abc import Iterator

from torch import nn

from benchmarks.models import prepare_torchvision
from tests.zoo.spec import Spec, images, require

_ENCODERS = ("resnet18", "timm-regnetx_002", "mobilenet_v2", "timm-efficientnet-b0", "densenet121")


def specs() -> Iterator[Spec]:
    """Every decoder with every encoder of a few kinds that it accepts."""
    require("segmentation_models_pytorch", "torchvision")
    prepare_torchvision()
    import segmentation_models_pytorch as smp

    for decoder in sorted(smp.MODEL_ARCHITECTURES_MAPPING):
        yield from _of_decoder(decoder)


_DILATED = ("deeplabv3", "deeplabv3plus", "pan")
_TRANSFORMERS = {"segformer": "mit_b0", "dpt": "tu-vit_tiny_patch16_224"}


def _of_decoder(decoder: str) -> Iterator[Spec]:
    if decoder in _TRANSFORMERS:
        make = functools.partial(_make, decoder, _TRANSFORMERS[decoder])
        # Their drop path reads values.
        yield Spec(
            "smp",
            f"{decoder}/{_TRANSFORMERS[decoder]}",
            make,
            images(224),
            device="cpu",
            family=decoder,
        )
        return
    for encoder in _ENCODERS:
        if encoder == "densenet121" and decoder in _DILATED:
            continue
        make = functools.partial(_make, decoder, encoder)
        yield Spec("smp", f"{decoder}/{encoder}", make, images(128), family=decoder)


def _make(decoder: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.create_model(decoder, encoder, encoder_weights=None, classes=3)
