"""The collections of the zoo by name."""

import functools

from tests.zoo import (
    domain_models,
    smp_models,
    timm_models,
    torchvision_models,
    transformers_models,
)
from tests.zoo.spec import Spec, Suite

SUITES: dict[str, Suite] = {
    "torchvision": torchvision_models.specs,
    "timm": timm_models.specs,
    "transformers": transformers_models.specs,
    "smp": smp_models.specs,
    "ultralytics": domain_models.ultralytics,
    "monai": domain_models.monai,
    "nnunet": domain_models.nnunet,
    "pytorchvideo": domain_models.pytorchvideo,
    "lightly": domain_models.lightly,
    "open_clip": domain_models.open_clip,
    "pyg": domain_models.geometric,
    "doctr": domain_models.doctr,
}


@functools.cache
def specs_of(suite: str) -> dict[str, Spec]:
    """Specs of one collection by name.

    Raises:
        MissingPackage: it is not installed.
    """
    return {spec.name: spec for spec in SUITES[suite]()}
