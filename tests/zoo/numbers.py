"""Numbers of the zoo: training and evaluation beside the unconverted model, on one rank and two."""

import dataclasses
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import bnrewrite
from tests.parity import assert_same_training, seed, tensors, to_double
from tests.ranks import RankPool
from tests.zoo.spec import Call
from tests.zoo.suites import specs_of


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A model whose training is compared, with images of the given size.

    Attributes:
        suite: the collection.
        name: the model.
        size: of square images; 0 for the arguments that the zoo has for it.
        options: changes to how the model is made.
        num_other: evaluations that are no sites by right.
        splits: whether ranks can share a batch, by rows of its only tensor.
    """

    suite: str
    name: str
    size: int = 64
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_other: int = 0
    splits: bool = True

    def __str__(self) -> str:
        return f"{self.suite}-{self.name}"

    def make(self) -> nn.Module:
        """The model on the CPU."""
        make = specs_of(self.suite)[self.name].make
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return functools.partial(make, **self.options)()

    def arguments(self, n: int) -> Call:
        """A batch of images."""
        if not self.size:
            return specs_of(self.suite)[self.name].arguments(nn.Identity(), n)
        return (torch.randn(n, 3, self.size, self.size),), {}


COMPARED = (
    Numbers("torchvision", "resnet18"),
    Numbers("torchvision", "googlenet"),
    Numbers("torchvision", "mobilenet_v3_small"),
    Numbers("torchvision", "shufflenet_v2_x0_5"),
    Numbers("torchvision", "lraspp_mobilenet_v3_large"),
    Numbers("timm", "test_efficientnet", options={"drop_path_rate": 0.2}),
    Numbers("timm", "test_resnet", options={"drop_block_rate": 0.1}),
    Numbers("timm", "tf_mobilenetv3_small_minimal_100"),
    Numbers("timm", "dla46_c"),
    Numbers("timm", "hrnet_w18_small"),
    Numbers("timm", "ghostnet_050"),
    Numbers("timm", "repvgg_a0", 32),
    Numbers("timm", "levit_128s", 224),
    Numbers("timm", "resnest14d"),
    Numbers("smp", "unet/resnet18"),
    Numbers("smp", "pspnet/mobilenet_v2"),
)


ON_TWO_RANKS = (
    Numbers("torchvision", "resnet18"),
    Numbers("timm", "dla46_c"),
    Numbers("smp", "unet/resnet18"),
)


FAMILIES = (
    Numbers("timm", "botnet26t_256", 256),
    Numbers("timm", "cspresnet50"),
    Numbers("timm", "coatnet_pico_rw_224", 224),
    Numbers("timm", "darknet17"),
    Numbers("timm", "densenet121"),
    Numbers("timm", "dla34"),
    Numbers("timm", "dpn48b"),
    Numbers("timm", "efficientformer_l1", 224),
    Numbers("timm", "efficientformerv2_s0", 224),
    Numbers("timm", "efficientvit_b0"),
    Numbers("timm", "efficientvit_m0", 224),
    Numbers("timm", "fasternet_t0"),
    Numbers("timm", "fastvit_t8"),
    Numbers("timm", "ghostnetv2_100"),
    Numbers("timm", "hardcorenas_a"),
    Numbers("timm", "hgnetv2_b0"),
    Numbers("timm", "hrnet_w18_small"),
    Numbers("timm", "inception_next_atto"),
    Numbers("timm", "inception_resnet_v2", 96),
    Numbers("timm", "inception_v3", 96),
    Numbers("timm", "inception_v4", 96),
    Numbers("timm", "lcnet_050"),
    Numbers("timm", "legacy_seresnet18"),
    Numbers("timm", "mixnet_s"),
    Numbers("timm", "mnasnet_small"),
    Numbers("timm", "mobilenetv4_conv_small_035"),
    Numbers("timm", "mobileone_s0"),
    Numbers("timm", "mobilevit_xxs"),
    Numbers("timm", "mobilevitv2_050"),
    Numbers("timm", "nasnetalarge", 96),
    Numbers("timm", "nextvit_small"),
    Numbers("timm", "pnasnet5large", 96),
    Numbers("timm", "regnetx_002"),
    Numbers("timm", "regnety_002"),
    Numbers("timm", "repghostnet_050"),
    Numbers("timm", "repvit_m0_9"),
    Numbers("timm", "res2net50_14w_8s"),
    Numbers("timm", "resnet18", options={"drop_path_rate": 0.2}),
    Numbers("timm", "rexnet_100"),
    Numbers("timm", "selecsls42"),
    Numbers("timm", "shvit_s1"),
    Numbers("timm", "skresnet18"),
    Numbers("timm", "starnet_s050"),
    Numbers("timm", "swiftformer_xs", 224),
    Numbers("timm", "tf_efficientnet_b0"),
    Numbers("timm", "tiny_vit_5m_224", 224),
    Numbers("timm", "tinynet_e"),
    Numbers("timm", "tresnet_m"),
    Numbers("timm", "vgg11_bn"),
    Numbers("timm", "visformer_tiny", 224),
    Numbers("timm", "volo_d1_224", 224),
    Numbers("timm", "ese_vovnet19b_slim"),
    Numbers("timm", "xception41"),
    Numbers("timm", "legacy_xception", 96),
    Numbers("timm", "xcit_nano_12_p16_224", 224),
    Numbers("timm", "convmixer_768_32"),
    Numbers("timm", "cpubone_nano", 224),
    Numbers("timm", "cspnext_tiny"),
    Numbers("timm", "efficientvim_m1", 224),
    Numbers("timm", "iformer_t", 224),
    Numbers("timm", "lcnetv2_small"),
    Numbers("timm", "lowformer_b0", 224),
    Numbers("timm", "resnetv2_18"),
    Numbers("timm", "vit_small_resnet50d_s16_224", 224),
)
"""With those of COMPARED, one model at least of every module of timm that has BatchNorm."""


DOMAINS = (
    Numbers("ultralytics", "yolov3-tiny"),
    Numbers("ultralytics", "yolov5"),
    Numbers("ultralytics", "yolov8"),
    Numbers("ultralytics", "yolov8-ghost"),
    Numbers("ultralytics", "yolov9t"),
    Numbers("ultralytics", "yolov10n"),
    Numbers("ultralytics", "yolo11"),
    Numbers("ultralytics", "yolo11-seg"),
    Numbers("ultralytics", "yolo11-pose"),
    Numbers("ultralytics", "yolo12"),
    Numbers("ultralytics", "yolo26"),
    # Its decoder stacks the outputs of its layers.
    Numbers("ultralytics", "rtdetr-resnet50", splits=False),
    Numbers("monai", "UNet", 0),
    Numbers("monai", "DynUNet", 0),
    Numbers("monai", "VNet", 0),
    Numbers("monai", "AHNet", 0),
    Numbers("monai", "UNETR", 0),
    # It drops connections at random, by a function.
    Numbers("monai", "EfficientNetBN", 0, splits=False),
    Numbers("nnunet", "PlainConvUNet", 0),
    Numbers("nnunet", "ResidualEncoderUNet", 0),
    Numbers("pytorchvideo", "x3d", 0),
    Numbers("pytorchvideo", "slowfast", 0, splits=False),
    Numbers("lightly", "SimSiam", 0),
    Numbers("lightly", "resnet-9", 0),
    Numbers("open_clip", "RN50", 0),
    Numbers("pyg", "GIN", 0, splits=False),
    Numbers("pyg", "PNA", 0, splits=False),
    Numbers("doctr", "fast_tiny", 0),
    Numbers("doctr", "textnet_tiny", 0),
)
"""Of libraries that are not installed for the tests."""


def compare(model: Numbers) -> None:
    """Three training steps and an evaluation equal those of the unconverted model."""
    with warnings.catch_warnings():
        # What our code warns of stays an error.
        warnings.filterwarnings("ignore", module=r"torch|timm|segmentation_models_pytorch")
        # Rounding errors of 1e-16 pass up to 200 layers, each of which may amplify them by rstd;
        # and after 200 layers a learning rate of 0.05 ends in NaN.
        assert_same_training(
            model.make, model.arguments, num_other=model.num_other, rtol=1e-7, rate=1e-3
        )


def compare_on_two_ranks(model: Numbers, ranks: RankPool, *, rtol: float = 1e-9) -> None:
    """A step of two ranks, with one image and three, equals one with all four in one process.

    Unless told otherwise to 1e-9 of the largest entry: float64 sums in another order cost 1e-16 a
    layer, amplified by rstd, which deep models do more often.
    """
    outputs, grads, buffers = _train(model, None)
    results = ranks.run(_train_rank, 2, model, timeout_s=600)
    joined = [torch.cat(parts) for parts in zip(*(outs for outs, _, _ in results), strict=True)]
    _assert_close(joined, outputs, "output", rtol)
    # Gradients of parameters are local sums, which DistributedDataParallel averages.
    sums = [a + b for a, b in zip(results[0][1], results[1][1], strict=True)]
    _assert_close(sums, grads, "gradient", rtol)
    for _, _, ours in results:
        _assert_close(ours, buffers, "buffer", rtol)


def _train(model: Numbers, rows: slice | None) -> list[list[Tensor]]:
    """Outputs, gradients and buffers of a step with some rows of a global batch of four."""
    seed(0)
    net = dataclasses.replace(model, options={}).make().double()
    for module in net.modules():
        # Two ranks draw other numbers than one.
        for name in ("p", "drop_prob", "drop_rate"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)
    if rows is not None:
        net = bnrewrite.convert(net)
    seed(1)
    args, _ = to_double(model.arguments(4))
    outs = tensors(net(args[0] if rows is None else args[0][rows]))
    losses = []
    for out in outs:
        weight = torch.sin(torch.arange(4 * out[0].numel()).to(out)).view(4, *out.shape[1:])
        losses.append((out * (weight if rows is None else weight[rows])).sum())
    torch.stack(losses).sum().backward()
    grads = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return [[out.detach() for out in outs], grads, [*net.buffers()]]


def _train_rank(rank: int, world_size: int, model: Numbers) -> list[list[Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _train(model, slice(0, 1) if rank == 0 else slice(1, 4))


def _assert_close(ours: list[Tensor], theirs: list[Tensor], what: str, rtol: float) -> None:
    scale = max(tensor.abs().max().item() for tensor in theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = (a - b).abs().max().item()
        assert error <= rtol * scale, f"{what} {index}: {error:.2e}, scale {scale:.2e}"
