"""Whole models: ResNet-18 in every run, the torchvision and timm zoos in the slow sweep."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import bnrewrite
from benchmarks.models import prepare_torchvision
from bnrewrite import export_onnx
from bnrewrite.export import files
from tests.export_models import Block, Mixed, initializers, operators, randomize
from tests.zoo.export import mild_statistics


@pytest.fixture(scope="module")
def torchvision_models() -> Any:
    prepare_torchvision()
    return pytest.importorskip("torchvision.models")


def image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def check_both_forms(model: Any, x: Tensor) -> None:
    bnrewrite.convert(mild_statistics(model))
    kept = export_onnx(model, (x,), dynamic_shapes=[{0: "batch"}])
    assert kept.model is not None
    state, found = model.state_dict(), initializers(kept.model)
    for name, value in found.items():
        if name in state:
            assert torch.equal(value, state[name]), name
    folded = export_onnx(model, (x,), dynamic_shapes=[{0: "batch"}], fold=True)
    assert folded.num_batch_norm + folded.num_folded == kept.num_batch_norm
    assert kept.verified == folded.verified == (2, 3)


def test_resnet18_is_49_nodes_and_20_batch_norms(torchvision_models):
    model = bnrewrite.convert(randomize(torchvision_models.resnet18(num_classes=10)))
    report = export_onnx(model, (image(64),), dynamic_shapes={"x": {0: "batch"}})
    assert report.model is not None
    assert report.num_batch_norm == 20
    assert report.num_nodes == 49 + 20
    assert operators(report.model)["Conv"] == 20
    used = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert used <= initializers(report.model).keys()
    folded = export_onnx(model, (image(64),), dynamic_shapes={"x": {0: "batch"}}, fold=True)
    assert (folded.num_nodes, folded.num_folded) == (49, 20)


TORCHVISION = {
    "alexnet": 128, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64,
    "efficientnet_v2_s": 64, "googlenet": 96, "inception_v3": 128, "maxvit_t": 224,
    "mnasnet0_5": 64, "mobilenet_v2": 64, "mobilenet_v3_large": 64, "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64, "regnet_y_400mf": 64, "resnet50": 64, "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64, "shufflenet_v2_x1_0": 64, "squeezenet1_0": 64, "vgg11_bn": 64,
    "wide_resnet50_2": 64,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, torchvision_models):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision_models.get_model(name, weights=None, **options)
    check_both_forms(model, image(TORCHVISION[name]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
)
def test_segmentation(name, torchvision_models):
    model = torchvision_models.get_model(name, weights=None, weights_backbone=None)
    check_both_forms(model, image(64))


TIMM = (
    "resnet18", "efficientnet_b0", "mobilenetv3_small_050", "hrnet_w18_small", "repvgg_a0",
    "regnety_002", "levit_128s", "ghostnet_050", "dm_nfnet_f0", "mobileone_s0", "tf_mixnet_s",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, torchvision_models):
    timm = pytest.importorskip("timm")
    check_both_forms(timm.create_model(name), image(224 if name == "levit_128s" else 96))


SECOND_RUNTIME = (
    "resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5", "googlenet",
    "regnet_y_400mf", "efficientnet_b0", "mnasnet0_5", "vgg11_bn", "resnext50_32x4d",
)  # fmt: skip


def run_in_openvino(path: Path, x: Tensor) -> Tensor:
    openvino = pytest.importorskip("openvino")
    # Its default on recent CPUs is bfloat16.
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (got,) = compiled(x.numpy()).values()
    return torch.from_numpy(np.array(got))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", SECOND_RUNTIME)
def test_openvino_agrees(name, fold, torchvision_models, tmp_path):
    pytest.importorskip("openvino")
    options = {"init_weights": False} if name == "googlenet" else {}
    model = mild_statistics(torchvision_models.get_model(name, weights=None, **options))
    x = image(TORCHVISION.get(name, 64))
    report = export_onnx(
        bnrewrite.convert(model),
        (x,),
        tmp_path / "m.onnx",
        dynamic_shapes=[{0: "batch"}],
        fold=fold,
    )
    assert report.num_folded > 0 if fold else report.num_batch_norm > 0
    more = torch.cat([x, x[:1]])
    with torch.no_grad():
        expected = model.eval()(more)
    # The tolerance of the export itself.
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(
        run_in_openvino(tmp_path / "m.onnx", more), expected, rtol=0, atol=atol
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fold", [False, True])
def test_openvino_runs_mixed_precision(fold, tmp_path):
    pytest.importorskip("openvino")
    model, x = bnrewrite.convert(randomize(Mixed())), image(8).half()
    report = export_onnx(model, (x,), tmp_path / "m.onnx", dynamic_shapes=[{0: "n"}], fold=fold)
    # The BatchNorm that two convolutions' worth of activations share is kept in either form.
    assert (report.num_batch_norm, report.num_batch_stats) == (1 if fold else 3, 1)
    with torch.no_grad():
        expected = model.eval()(x)
    # The tolerance of the export itself for float16.
    atol = 1e-2 * expected.abs().max().item()
    torch.testing.assert_close(run_in_openvino(tmp_path / "m.onnx", x), expected, rtol=0, atol=atol)


def test_weights_that_do_not_fit_go_to_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", 1000)
    x = image(8)
    with pytest.raises(bnrewrite.ExportError, match="external_data=False, but the weights take"):
        export_onnx(Block(), (x,), tmp_path / "m.onnx", external_data=False)
    assert not list(tmp_path.iterdir())
    report = export_onnx(Block(), (x,), tmp_path / "m.onnx")
    assert report.external_data == "m.onnx.data"


@pytest.mark.slow
@pytest.mark.skipif(
    # Seen: 9.1 GiB at most.
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 16 * 2**30,
    reason="needs 16 GB",
)
def test_a_model_over_2_gigabytes(tmp_path: Path):
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 24000),
        torch.nn.BatchNorm1d(24000),
        torch.nn.Linear(24000, 24000),
        torch.nn.BatchNorm1d(24000),
    )
    for fold in (False, True):
        report = export_onnx(
            randomize(model), (torch.randn(2, 16),), tmp_path / "m.onnx", fold=fold,
            dynamic_shapes=[{0: "batch"}],
        )  # fmt: skip
        assert report.external_data == "m.onnx.data"
        assert report.num_folded == 2 * fold
        assert report.verified == (2, 3)
        assert (tmp_path / "m.onnx.data").stat().st_size > 2**31
        onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
