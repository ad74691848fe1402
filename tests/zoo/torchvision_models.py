"""torchvision: classification, segmentation, video, optical flow, detection."""

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.models import prepare_torchvision
from tests.zoo.spec import Call, Spec, images, require

_DETECTION = ("rcnn", "retinanet", "fcos", "ssd")


class Detector(nn.Module):
    """The parts of a detector that need none of torchvision's compiled operators.

    These are all parts with BatchNorm: the backbone, the head of one-stage detectors and, in the
    newer R-CNNs, the box and mask heads, which get regions of random features.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, x: Tensor, regions: Tensor) -> list[object]:
        outputs: list[object] = [*self.detector.backbone(x).values()]
        if hasattr(self.detector, "head"):
            outputs.append(self.detector.head(outputs))
        heads = getattr(self.detector, "roi_heads", None)
        for name in ("box_head", "mask_head", "keypoint_head"):
            head = getattr(heads, name, None)
            if head is not None:
                size = 7 if name == "box_head" else 14
                outputs.append(head(regions[..., :size, :size]))
        return outputs


def specs() -> Iterator[Spec]:
    """Every model of torchvision; those without BatchNorm are for the caller to leave out."""
    require("torchvision")
    prepare_torchvision()
    from torchvision import models

    video = models.list_models(module=models.video)
    for name in models.list_models():
        family = models.get_model_builder(name).__module__
        if any(word in name for word in _DETECTION):
            make = functools.partial(_detector, name)
            yield Spec("torchvision", name, make, _regions, family=family)
        elif name.startswith("raft"):
            make = functools.partial(models.get_model, name, weights=None)
            yield Spec(
                "torchvision", name, make, _two_frames, device="cpu", batch_size=1, family=family
            )
        elif name in video:
            make = functools.partial(models.get_model, name, weights=None)
            yield Spec("torchvision", name, make, _clip, family=family)
        else:
            size = 299 if name.endswith("inception_v3") else 224
            make = functools.partial(_classifier, name)
            yield Spec("torchvision", name, make, images(size), family=family)


def _classifier(name: str) -> nn.Module:
    from torchvision import models

    options: dict[str, object] = {}
    if name.endswith(("googlenet", "inception_v3")):
        # Their own initialization draws through scipy for minutes, and warns when not told.
        options["init_weights"] = False
    if name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
    if name.startswith("regnet"):
        # Its constructor computes widths with tensors and reads them.
        compute = models.regnet.BlockParams.from_init_params

        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            with torch.device("cpu"):
                return compute(*args, **kwargs)

        with mock.patch.object(models.regnet.BlockParams, "from_init_params", on_cpu):
            return models.get_model(name, weights=None)
    return models.get_model(name, weights=None, **options)


def _detector(name: str) -> nn.Module:
    from torchvision import models

    return Detector(models.get_model(name, weights=None, weights_backbone=None))


def _regions(model: nn.Module, n: int) -> Call:
    return (torch.rand(n, 3, 320, 320), torch.rand(n, 256, 14, 14)), {}


def _two_frames(model: nn.Module, n: int) -> Call:
    return (torch.rand(n, 3, 128, 128), torch.rand(n, 3, 128, 128)), {"num_flow_updates": 1}


def _clip(model: nn.Module, n: int) -> Call:
    return (torch.rand(n, 3, 16, 224, 224),), {}
