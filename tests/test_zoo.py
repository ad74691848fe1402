"""A sample of the zoo: no BatchNorm evaluation escapes, and training stays the same."""

import dataclasses
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnrewrite
from tests.parity import assert_same_training, seed, to_double
from tests.ranks import RankPool
from tests.zoo.spec import Call, MissingPackage, Spec
from tests.zoo.suites import specs_of
from tests.zoo.sweep import sweep

COUNTED = {
    "torchvision": (
        "densenet121",  # lists of tensors as arguments, isinstance on them
        "inception_v3",  # auxiliary head, branches
        "efficientnet_b0",  # stochastic depth
        "regnet_y_400mf",
        "fasterrcnn_resnet50_fpn_v2",  # BatchNorm in the box head
        "ssdlite320_mobilenet_v3_large",
        "deeplabv3_resnet50",  # parallel branches, auxiliary head
        "raft_large",  # InstanceNorm
        "s3d",  # three dimensions, branches
    ),
    "timm": (
        "tf_efficientnet_lite0",  # "SAME" padding
        "hrnet_w18_small",
        "dla34",  # optional arguments
        "res2net50_26w_4s",  # slices in a loop
        "resnest14d",  # split attention
        "skresnet18",
        "ghostnet_100",
        "repvgg_a0",
        "mobileone_s0",  # optional children
        "levit_128s",  # BatchNorm1d
        "nfnet_f0",  # standardised weights only
        "resnetv2_50x1_bit",  # standardised weights only
        "mobilenetv4_conv_small",
        "xcit_nano_12_p16_224",
    ),
    "transformers": (
        "ResNetModel",
        "EfficientNetModel",
        "MobileNetV1Model",  # padding that cannot be traced
        "MobileViTForSemanticSegmentation",
        "SegformerForSemanticSegmentation",  # cannot be traced
        "Wav2Vec2ConformerModel",
    ),
    "smp": ("unet/resnet18", "pspnet/timm-efficientnet-b0"),
}
"""Models that contain every kind of trouble; the comment says which."""


def spec(suite: str, name: str) -> Spec:
    """The spec, or a skipped test if its collection is not installed."""
    try:
        with warnings.catch_warnings():
            # Libraries warn about deprecations of each other when they are imported.
            warnings.simplefilter("ignore")
            return specs_of(suite)[name]
    except MissingPackage as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("suite", "name"), [(suite, name) for suite, names in COUNTED.items() for name in names]
)
def test_no_evaluation_escapes(suite: str, name: str) -> None:
    row = sweep(spec(suite, name))
    assert row is not None
    assert row.error is None, row.error
    assert row.num_plain > 0
    assert row.num_escaped == 0
    assert row.num_ours == row.num_plain - row.num_others


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A model whose training is compared, with images of the given size.

    Attributes:
        suite: the collection.
        name: the model.
        size: of square images.
        options: changes to how the model is made.
        num_other: evaluations that are no sites by right.
    """

    suite: str
    name: str
    size: int = 64
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_other: int = 0

    def make(self) -> nn.Module:
        """The model on the CPU."""
        make = spec(self.suite, self.name).make
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return functools.partial(make, **self.options)()

    def arguments(self, n: int) -> Call:
        """A batch of images."""
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


@pytest.mark.parametrize("model", COMPARED, ids=lambda model: f"{model.suite}-{model.name}")
def test_trains_and_evaluates_like_the_unconverted_model(model: Numbers) -> None:
    _compare(model)


def _compare(model: Numbers) -> None:
    with warnings.catch_warnings():
        # What our code warns of stays an error.
        warnings.filterwarnings("ignore", module=r"torch|timm|segmentation_models_pytorch")
        # Rounding errors of 1e-16 pass up to 200 layers, each of which may amplify them by rstd;
        # and after 200 layers a learning rate of 0.05 ends in NaN.
        assert_same_training(
            model.make, model.arguments, num_other=model.num_other, rtol=1e-7, rate=1e-3
        )


ON_TWO_RANKS = (
    Numbers("torchvision", "resnet18"),
    Numbers("timm", "dla46_c"),
    Numbers("smp", "unet/resnet18"),
)


def _train(model: Numbers, rows: slice | None) -> list[list[Tensor]]:
    """Outputs, gradients and buffers of a step with some rows of a global batch of four."""
    seed(0)
    net = model.make().double()
    if rows is not None:
        net = bnrewrite.convert(net)
    seed(1)
    args, _ = to_double(model.arguments(4))
    out = net(args[0] if rows is None else args[0][rows])
    weight = torch.sin(torch.arange(4 * out[0].numel()).to(out)).view(4, *out.shape[1:])
    (out * (weight if rows is None else weight[rows])).sum().backward()
    grads = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return [[out.detach()], grads, [*net.buffers()]]


def _train_rank(rank: int, world_size: int, model: Numbers) -> list[list[Tensor]]:
    return _train(model, slice(0, 1) if rank == 0 else slice(1, 4))


@pytest.mark.parametrize("model", ON_TWO_RANKS, ids=lambda model: f"{model.suite}-{model.name}")
def test_two_ranks_train_like_one_process_with_the_global_batch(
    model: Numbers, ranks: RankPool
) -> None:
    outputs, grads, buffers = _train(model, None)
    results = ranks.run(_train_rank, 2, model)
    _assert_close([torch.cat([out for (out,), _, _ in results])], outputs, "output")
    # Gradients of parameters are local sums, which DistributedDataParallel averages.
    sums = [a + b for a, b in zip(results[0][1], results[1][1], strict=True)]
    _assert_close(sums, grads, "gradient")
    for _, _, ours in results:
        _assert_close(ours, buffers, "buffer")


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
)
"""One model at least of every module of timm that has BatchNorm."""


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model.name)
def test_every_family_of_timm_trains_like_the_unconverted_model(model: Numbers) -> None:
    _compare(model)


def _assert_close(ours: list[Tensor], theirs: list[Tensor], what: str) -> None:
    """float64 sums in another order: 1e-16 a layer, amplified by rstd; 1e-9 is far above."""
    scale = max(tensor.abs().max().item() for tensor in theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = (a - b).abs().max().item()
        assert error <= 1e-9 * scale, f"{what} {index}: {error:.2e}, scale {scale:.2e}"
