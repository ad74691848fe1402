"""A sample of the zoo: no BatchNorm evaluation escapes, and training stays the same."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

from tests.parity import seed, tensors
from tests.ranks import RankPool
from tests.zoo.export import mild_statistics
from tests.zoo.numbers import (
    COMPARED,
    FAMILIES,
    ON_TWO_RANKS,
    Numbers,
    compare,
    compare_on_two_ranks,
)
from tests.zoo.spec import MissingPackage, Spec
from tests.zoo.suites import specs_of
from tests.zoo.sweep import sweep
from tests.zoo.transformers_models import _ENTRIES

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
        "nfnet_f0",  # standardized weights only
        "resnetv2_50x1_bit",  # standardized weights only
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

DETECTORS = (
    "DFineModel", "Deimv2Model", "PPDocLayoutV2Model", "PPDocLayoutV3Model", "PPDocLayoutV4Model",
    "RTDetrModel", "RTDetrV2Model",
)  # fmt: skip
"""Models that decode the positions of the best scores."""


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


@pytest.mark.parametrize("model", COMPARED, ids=str)
def test_trains_and_evaluates_like_the_unconverted_model(model: Numbers) -> None:
    spec(model.suite, model.name)
    compare(model)


@pytest.mark.parametrize("model", ON_TWO_RANKS, ids=str)
def test_two_ranks_train_like_one_process_with_the_global_batch(
    model: Numbers, ranks: RankPool
) -> None:
    spec(model.suite, model.name)
    compare_on_two_ranks(model, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES, ids=str)
def test_every_family_of_timm_trains_like_the_unconverted_model(model: Numbers) -> None:
    spec(model.suite, model.name)
    compare(model)


def test_every_family_of_timm_is_compared() -> None:
    """Every module of timm that makes a model with BatchNorm, as the stored sweep has them."""
    spec("timm", "resnet18")
    specs = specs_of("timm")
    compared = {
        specs[model.name].family for model in (*COMPARED, *FAMILIES) if model.suite == "timm"
    }
    stored = Path(__file__).parents[1] / "benchmarks/results/zoo_timm.json"
    rows = json.loads(stored.read_text())["rows"]
    found = {specs[row["name"]].family for row in rows if row["num_batch_norms"]}
    assert found <= compared


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_chooses_positions_by_the_image_and_not_by_rounding(name: str) -> None:
    """Else exports would be compared by chance, or not see what they do to the image."""
    detector = dataclasses.replace(spec("transformers", name), device="cpu")
    seed(0)
    model = mild_statistics(detector.build()).eval()
    args, kwargs = detector.call(model)
    with torch.no_grad():
        scores_NS = model(*args, **kwargs).enc_outputs_class.amax(-1)
    one, other = scores_NS
    assert (one - other).abs().max() > 1e-3
    best = scores_NS.sort(-1, descending=True).values[:, : model.config.num_queries + 1]
    # Rounding changes a score by about 1e-5.
    assert -best.diff().max() > 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [entry.name for entry in _ENTRIES if entry.gain])
def test_the_output_of_an_amplified_model_depends_on_the_image(name: str) -> None:
    amplified = dataclasses.replace(spec("transformers", name), device="cpu")
    seed(0)
    model = mild_statistics(amplified.build()).eval()
    args, kwargs = amplified.call(model)
    with torch.no_grad():
        out = tensors(model(*args, **kwargs))[0]
    assert (out[0] - out[1]).abs().max() > 1e-3 * out.abs().max()
