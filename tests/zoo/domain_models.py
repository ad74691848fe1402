"""Libraries of one domain each: detection, medical images, video, contrast, graphs, text.

Each function gives the specs of one of them. They are not installed by ``.[test]``.
"""

# pyright: reportMissingImports=false

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import prepare_torchvision
from tests.zoo.spec import Call, Spec, images, require

_EXTRA = "zoo-domains"


def _tensor(*shape: int) -> Callable[[nn.Module, int], Call]:
    """Arguments maker: one batch (n, *shape)."""
    return lambda model, n: ((torch.rand(n, *shape),), {})


_VOLUME = _tensor(1, 32, 32, 32)


def ultralytics() -> Iterator[Spec]:
    """Every configuration of YOLO and RT-DETR that needs no other weights or packages."""
    require("ultralytics", "torchvision", extra=_EXTRA)
    prepare_torchvision()
    import ultralytics
    from ultralytics.nn import tasks

    heads = {
        "-seg": tasks.SegmentationModel,
        "-pose": tasks.PoseModel,
        "-obb": tasks.OBBModel,
        "-cls": tasks.ClassificationModel,
        "rtdetr": tasks.RTDETRDetectionModel,
    }
    assert ultralytics.__file__ is not None
    for path in sorted((Path(ultralytics.__file__).parent / "cfg/models").rglob("*.yaml")):
        name = path.stem
        # These ask for CLIP and for weights of torchvision.
        if "world" in name or "yoloe" in name or name == "yolo11-cls-resnet18":
            continue
        kind = next((kind for part, kind in heads.items() if part in name), tasks.DetectionModel)
        make = functools.partial(kind, str(path), ch=3, verbose=False)
        # To find their strides they run a forward as they are made, and read values.
        yield Spec("ultralytics", name, make, images(64), device="cpu", family=kind.__name__)


def monai() -> Iterator[Spec]:
    """Networks of MONAI, with BatchNorm where another norm is the default."""
    require("monai", "torchvision", extra=_EXTRA)
    prepare_torchvision()
    from monai.networks import nets

    wide, deep = (8, 8, 16, 16, 32, 8), {"norm": "batch", "dsdepth": 2}
    kernels = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)}
    dyn = {**kernels, "filters": (8, 16, 32), "norm_name": "batch", "res_block": True}
    supervised = {"deep_supervision": True, "deep_supr_num": 1}
    unetr = {"feature_size": 8, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
    made: dict[Callable[..., Call], dict[str, Callable[[], Any]]] = {
        _VOLUME: {
            "UNet": lambda: nets.UNet(3, 1, 2, wide[:3], (2, 2), num_res_units=2, norm="batch"),
            "BasicUNet": lambda: nets.BasicUNet(3, 1, 2, wide, norm="batch"),
            "DynUNet": lambda: nets.DynUNet(3, 1, 2, **dyn, **supervised),
            "SegResNet": lambda: nets.SegResNet(3, 8, 1, 2, norm="batch"),
            "SegResNetDS": lambda: nets.SegResNetDS(3, 8, 1, 2, **deep),
            "VNet": lambda: nets.VNet(3, 1, 2, dropout_prob_down=None),
            "HighResNet": lambda: nets.HighResNet(3, 1, 2),
            "AHNet": lambda: nets.AHNet((1, 1, 1, 1), 3, 1, 2, psp_block_num=0),
            "DenseNet121": lambda: nets.DenseNet121(3, 1, 2),
            "resnet10": lambda: nets.resnet10(spatial_dims=3, n_input_channels=1),
            "AttentionUnet": lambda: nets.AttentionUnet(3, 1, 2, (8, 16, 32), (2, 2)),
            "UNETR": lambda: nets.UNETR(1, 2, (32, 32, 32), norm_name="batch", **unetr),
        },
        _tensor(1, 64, 64, 64): {
            "SwinUNETR": lambda: nets.SwinUNETR(1, 2, feature_size=12, norm_name="batch"),
        },
        _tensor(2, 32, 32, 32): {
            "LocalNet": lambda: nets.LocalNet(3, 2, 8, extract_levels=(0, 1, 2)),
            "GlobalNet": lambda: nets.GlobalNet((32, 32, 32), 3, 2, 8, 3),
            "RegUNet": lambda: nets.RegUNet(3, 2, 8, 2),
        },
        _tensor(1, 32, 32): {
            "Regressor": lambda: nets.Regressor((1, 32, 32), (2,), (8, 16), (2, 2), norm="batch"),
            "AutoEncoder": lambda: nets.AutoEncoder(2, 1, 1, (8, 16), (2, 2), norm="batch"),
            "PatchDiscriminator": lambda: nets.PatchDiscriminator(2, 8, 1, num_layers_d=2),
        },
        images(64): {
            "SEResNet50": lambda: nets.SEResNet50(spatial_dims=2, in_channels=3),
            "EfficientNetBN": lambda: nets.EfficientNetBN("efficientnet-b0", pretrained=False),
            "FlexibleUNet": lambda: nets.FlexibleUNet(3, 2, "efficientnet-b0"),
        },
        images(256): {"HoVerNet": lambda: nets.HoVerNet("fast", 3, 3)},
        _tensor(3, 3, 64, 64): {"MILModel": lambda: nets.MILModel(2, "att", False, "resnet18")},
    }
    for arguments, makers in made.items():
        for name, make in makers.items():
            yield Spec("monai", name, make, arguments, device="cpu")


def nnunet() -> Iterator[Spec]:
    """The two networks of nnU-Net, whose blocks register their layers twice."""
    require("dynamic_network_architectures", extra=_EXTRA)
    from dynamic_network_architectures.architectures import unet

    options = {
        "input_channels": 1,
        "n_stages": 3,
        "features_per_stage": (8, 16, 32),
        "conv_op": nn.Conv3d,
        "kernel_sizes": 3,
        "strides": (1, 2, 2),
        "num_classes": 2,
        "norm_op": nn.BatchNorm3d,
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": True,
    }
    plain = {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": (2, 2)}
    residual = {"n_blocks_per_stage": (1, 2, 2), "n_conv_per_stage_decoder": (1, 1)}
    for kind, more in ((unet.PlainConvUNet, plain), (unet.ResidualEncoderUNet, residual)):
        make = functools.partial(kind, **options, **more)
        yield Spec("nnunet", kind.__name__, make, _VOLUME, device="cpu")


def pytorchvideo() -> Iterator[Spec]:
    """A network of each kind, also of two pathways that it gets in a list."""
    require("pytorchvideo", "torchvision", extra=_EXTRA)
    prepare_torchvision()
    from pytorchvideo.models import csn, r2plus1d, resnet, slowfast, x3d

    two = {
        "head_pool_kernel_sizes": ((2, 2, 2), (8, 2, 2)),
        "slowfast_channel_reduction_ratio": (8,),
        "slowfast_fusion_conv_stride": (4, 1, 1),
    }

    def pathways(model: nn.Module, n: int) -> Call:
        return ([torch.rand(n, 3, frames, 64, 64) for frames in (2, 8)],), {}

    made: dict[str, tuple[Callable[[], nn.Module], Callable[..., Call]]] = {
        "resnet": (
            lambda: resnet.create_resnet(head_pool_kernel_size=(4, 2, 2)),
            _tensor(3, 4, 64, 64),
        ),
        "csn": (lambda: csn.create_csn(head_pool_kernel_size=(1, 2, 2)), _tensor(3, 8, 64, 64)),
        "r2plus1d": (
            lambda: r2plus1d.create_r2plus1d(head_pool_kernel_size=(1, 2, 2)),
            _tensor(3, 8, 64, 64),
        ),
        "x3d": (
            lambda: x3d.create_x3d(input_clip_length=4, input_crop_size=64),
            _tensor(3, 4, 64, 64),
        ),
        "slowfast": (lambda: slowfast.create_slowfast(**two), pathways),
    }
    for name, (make, arguments) in made.items():
        yield Spec("pytorchvideo", name, make, arguments, device="cpu")


class _SimSiam(nn.Module):
    """As lightly's tutorial puts it together, for two views."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.models.modules import heads
        from torchvision.models import resnet18

        self.backbone = nn.Sequential(*[*resnet18().children()][:-1])
        self.projection = heads.SimSiamProjectionHead(512, 128, 128)
        self.prediction = heads.SimSiamPredictionHead(128, 32, 128)

    def _one(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projection(self.backbone(x).flatten(start_dim=1))
        return z.detach(), self.prediction(z)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (*self._one(x), *self._one(x.flip(-1)))


def lightly() -> Iterator[Spec]:
    """Its ResNets, its heads with BatchNorm, and a model of two views."""
    require("lightly", "torchvision", extra=_EXTRA)
    prepare_torchvision()
    from lightly.models import ResNetGenerator
    from lightly.models.modules import heads

    for name in ("resnet-9", "resnet-18", "resnet-50"):
        make = functools.partial(ResNetGenerator, name)
        yield Spec("lightly", name, make, images(32), device="cpu", family="resnet")
    yield Spec("lightly", "SimSiam", _SimSiam, images(64), device="cpu")
    for name in ("BarlowTwins", "BYOL", "NNCLR", "SwaV", "VICReg", "SMoG", "TiCo", "SimCLR"):
        make = functools.partial(getattr(heads, f"{name}ProjectionHead"), 64, 128, 32)
        yield Spec("lightly", name, make, _tensor(64), device="cpu", family="heads")
    make = functools.partial(heads.DINOProjectionHead, 64, 128, 32, 32, batch_norm=True)
    yield Spec("lightly", "DINO", make, _tensor(64), device="cpu", family="heads")


def open_clip() -> Iterator[Spec]:
    """The image towers with BatchNorm; those of ConvNeXt and ViT have none."""
    require("open_clip", "torchvision", extra=_EXTRA)
    prepare_torchvision()
    from open_clip import get_model_config, model

    for name in ("RN50", "RN101", "RN50x4"):
        config = get_model_config(name)
        assert config is not None
        size = config["vision_cfg"]["image_size"]
        make = functools.partial(
            model._build_vision_tower, config["embed_dim"], config["vision_cfg"]
        )
        yield Spec("open_clip", name, make, images(size), device="cpu", family="RN")


def geometric() -> Iterator[Spec]:
    """Networks of PyTorch Geometric on random graphs, with BatchNorm over nodes."""
    require("torch_geometric", extra=_EXTRA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_geometric import nn as gnn

    def graph(model: nn.Module, n: int) -> Call:
        return (torch.rand(20 * n, 8), torch.randint(0, 20 * n, (2, 60 * n))), {}

    principal = {
        "aggregators": ["mean", "max"],
        "scalers": ["identity"],
        "deg": torch.tensor([1, 3, 5, 3]),
    }
    for name in ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN"):
        more = principal if name == "PNA" else {}
        make = functools.partial(getattr(gnn, name), 8, 16, 3, norm="batch_norm", **more)
        axes = {0: "nodes"}, {1: "edges"}
        yield Spec("pyg", name, make, graph, device="cpu", axes=axes)
    yield Spec("pyg", "MLP", lambda: gnn.MLP([8, 16, 16, 2]), _tensor(8), device="cpu")


def doctr() -> Iterator[Spec]:
    """Detection, and backbones of recognition, which itself wants labels in training."""
    require("doctr", "torchvision", extra=_EXTRA)
    prepare_torchvision()
    from doctr.models import classification, detection

    for name in (
        "db_resnet34",
        "db_mobilenet_v3_large",
        "linknet_resnet18",
        "fast_tiny",
        "fast_base",
    ):
        make = functools.partial(
            getattr(detection, name), pretrained=False, pretrained_backbone=False, exportable=True
        )
        yield Spec("doctr", name, make, images(64), device="cpu")
    for name in ("resnet31", "magc_resnet31", "textnet_tiny", "mobilenet_v3_small_r", "vgg16_bn_r"):
        make = functools.partial(getattr(classification, name), pretrained=False)
        yield Spec("doctr", name, make, images(32, 128), device="cpu")
