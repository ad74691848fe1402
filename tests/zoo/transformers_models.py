"""transformers: one model at least of every vision and audio family with BatchNorm.

Configurations are the defaults, changed where the default has no BatchNorm or does not run.
"""

import dataclasses
import functools
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from benchmarks.models import prepare_torchvision
from tests.zoo.spec import Call, Spec, require

Inputs = Callable[[Any, int], dict[str, Any]]


class Part(nn.Module):
    """Converts with the whole model but runs one part of it: the one with BatchNorm.

    Around it are language models and generation loops that have none.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self.model = model
        self._path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        *parents, method = self._path.split(".")
        holder = self.model.get_submodule(".".join(parents))
        return getattr(holder, method)(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One model class.

    Attributes:
        name: of the class.
        inputs: keyword arguments of the forward, for a model and a batch size.
        part: path of what runs below the model; all of it if empty.
        device: "cpu" where the forward reads values.
        config: changes to the default configuration; "a.b" changes b of the part a of it.
        gain: what a layer's weights make of the size of its input at least; 0 leaves them alone.
            The defaults of many models let so little of the image through that what reaches the
            output is less than rounding, and a comparison of outputs says nothing.
    """

    name: str
    inputs: Inputs
    part: str = ""
    device: str = "meta"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gain: float = 0.0


def specs() -> Iterator[Spec]:
    """Every entry of the table below."""
    require("transformers", "torchvision")
    prepare_torchvision()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    for entry in _ENTRIES:
        name = f"{entry.name}.{entry.part}" if entry.part else entry.name
        yield Spec(
            "transformers",
            name,
            functools.partial(_make, entry),
            functools.partial(_arguments, entry),
            device=entry.device,
        )


def _make(entry: _Entry) -> nn.Module:
    import transformers

    cls = getattr(transformers, entry.name)
    options = dict(entry.config)
    of_parts = {name: options.pop(name) for name in entry.config if "." in name}
    config = cls.config_class(**options)
    for name, value in of_parts.items():
        part, _, last = name.rpartition(".")
        setattr(operator.attrgetter(part)(config), last, value)
    model = cls(config)
    if entry.gain:
        _amplify(model, entry.gain)
    return Part(model, entry.part) if entry.part else model


def _amplify(model: nn.Module, gain: float) -> None:
    for module in model.modules():
        if isinstance(module, (_ConvNd, nn.Linear)) and not module.weight.is_meta:
            found = module.weight.detach().std().item() * math.sqrt(module.weight[0].numel())
            if 0.0 < found < 1.0:
                module.weight.data.mul_(gain / found)


def _arguments(entry: _Entry, model: nn.Module, n: int) -> Call:
    inner: Any = model.model if isinstance(model, Part) else model
    return (), entry.inputs(inner, n)


def _pixels(*shape: int, name: str = "pixel_values") -> Inputs:
    """A batch of images; by default in the size of the configuration, else 224."""

    def inputs(model: Any, n: int) -> dict[str, Any]:
        size = getattr(model.config, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.rand(n, *(shape or (3, height, width)))}

    return inputs


def _floats(**shapes: tuple[int, ...]) -> Inputs:
    return lambda model, n: {name: torch.rand(n, *shape) for name, shape in shapes.items()}


def _tokens(n: int, length: int = 8) -> Tensor:
    return torch.ones(n, length, dtype=torch.long)


_LONG, _MIDDLE, _SHORT = 7, 5, 3
_DETECT_TEXT = {
    "kernel_list": [3, 2, 2],
    "scale_factor_list": [1, 2, 4, 8],
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"{kind}_{length}ratio": [kernel, [1, 1], padding]
            for length, size in (("long", _LONG), ("mid", _MIDDLE), ("short", _SHORT))
            for kind, kernel, padding in (
                ("vertical_long_to_small_conv", [size, 1], [size // 2, 0]),
                ("horizontal_small_to_long_conv", [1, size], [0, size // 2]),
                ("symmetric_conv_long", [size, size], [size // 2, size // 2]),
            )
        },
    },
}
"""What the default configuration of two text detectors leaves open."""

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_SPEECH = {"num_hidden_layers": 2}
_FEW_QUERIES = {"num_queries": 5}
"""Detectors that decode the best of some hundred positions: with random weights their scores are
so close that rounding decides which of them are among the best 300, and in which order.
"""

_WIDE = {**_FEW_QUERIES, "initializer_range": 0.05, "backbone_config.initializer_range": 0.1}
"""The same with weights that let the image through their backbone, HGNetV2: with those of the
default the best scores of two images differ by 1e-9, and those of the best positions by rounding.
"""

_ENTRIES = (
    _Entry("AlignVisionModel", _pixels()),
    _Entry("BeitForSemanticSegmentation", _pixels(), config={"out_indices": [3, 5, 7, 11]}),
    _Entry("BitModel", _pixels()),
    _Entry("CvtModel", _pixels()),
    _Entry("DFineModel", _pixels(3, 160, 160), device="cpu", config=_WIDE),
    _Entry("Data2VecVisionForSemanticSegmentation", _pixels()),
    _Entry("Deimv2Model", _pixels(3, 160, 160), device="cpu", config=_WIDE),
    _Entry(
        "DepthProForDepthEstimation",
        _pixels(3, 1536, 1536),
        config={"use_batch_norm_in_fusion_residual": True},
    ),
    _Entry("DPTForDepthEstimation", _pixels(), config={"use_batch_norm_in_fusion_residual": True}),
    _Entry("DPTForSemanticSegmentation", _pixels()),
    _Entry("EfficientLoFTRModel", _pixels(2, 3, 96, 96), device="cpu"),
    _Entry("EfficientNetModel", _pixels()),
    _Entry("GLPNForDepthEstimation", _pixels()),
    _Entry(
        "GroupViTModel",
        lambda model, n: {"pixel_values": torch.rand(n, 3, 224, 224), "input_ids": _tokens(n)},
        device="cpu",
    ),
    _Entry("HGNetV2ForImageClassification", _pixels(), gain=1.0),
    _Entry("LevitForImageClassificationWithTeacher", _pixels(), gain=1.0),
    _Entry(
        "LwDetrModel",
        _pixels(3, 256, 256),
        device="cpu",
        config={"projector_scale_factors": [2.0, 0.5]},
    ),
    _Entry("MobileNetV1Model", _pixels(), gain=1.4),
    _Entry("MobileNetV2ForSemanticSegmentation", _pixels()),
    _Entry("MobileViTForSemanticSegmentation", _pixels(), gain=1.4),
    _Entry("MobileViTV2ForSemanticSegmentation", _pixels(), gain=1.0),
    _Entry(
        "OmDetTurboForObjectDetection",
        lambda model, n: {
            "pixel_values": torch.rand(n, 3, 640, 640),
            "classes_input_ids": _tokens(2 * n),
            "classes_attention_mask": _tokens(2 * n),
            "tasks_input_ids": _tokens(n),
            "tasks_attention_mask": _tokens(n),
            "classes_structure": torch.full((n,), 2),
        },
        device="cpu",
    ),
    _Entry(
        "PerceiverForImageClassificationConvProcessing",
        _pixels(name="inputs"),
        device="cpu",
        config={"num_cross_attention_heads": 1, "num_latents": 8, "num_blocks": 1},
    ),
    _Entry("PPDocLayoutV2Model", _pixels(3, 160, 160), device="cpu", config=_WIDE),
    _Entry("PPDocLayoutV3Model", _pixels(3, 160, 160), device="cpu", config=_WIDE),
    _Entry("PPDocLayoutV4Model", _pixels(3, 160, 160), device="cpu", config=_WIDE),
    _Entry("PPLCNetForImageClassification", _pixels()),
    _Entry("PPLCNetV3Backbone", _pixels(), gain=0.8),
    _Entry("PPLCNetV4Backbone", _pixels()),
    _Entry("PPOCRV5MobileDetForObjectDetection", _pixels(), gain=0.6),
    _Entry("PPOCRV5MobileRecModel", _pixels(), gain=0.8),
    _Entry("PPOCRV5ServerDetForObjectDetection", _pixels(), config=_DETECT_TEXT, gain=0.8),
    _Entry("PPOCRV5ServerRecModel", _pixels(), gain=1.0),
    _Entry(
        "PPOCRV6MediumDetForObjectDetection",
        _pixels(),
        config={
            **_DETECT_TEXT,
            "backbone_config": {"model_type": "hgnet_v2", "out_features": _STAGES},
        },
        gain=0.8,
    ),
    _Entry(
        "PPOCRV6SmallDetForObjectDetection",
        _pixels(),
        config={
            "backbone_config": {"model_type": "pp_lcnet_v3", "out_features": _STAGES},
            "layer_list_out_channels": [32, 64, 128, 256],
        },
        gain=0.6,
    ),
    _Entry("PPOCRV6SmallRecModel", _pixels()),
    _Entry("PPOCRV6TinyRecModel", _pixels()),
    _Entry("RegNetModel", _pixels()),
    _Entry("ResNetModel", _pixels()),
    _Entry("RTDetrModel", _pixels(3, 160, 160), device="cpu", config=_FEW_QUERIES),
    _Entry("RTDetrResNetBackbone", _pixels()),
    _Entry("RTDetrV2Model", _pixels(3, 160, 160), device="cpu", config=_FEW_QUERIES),
    _Entry("SegformerForSemanticSegmentation", _pixels()),
    _Entry("SLANetForTableRecognition", _pixels(), device="cpu"),
    _Entry("SuperGlueForKeypointMatching", _pixels(2, 3, 96, 96), device="cpu"),
    _Entry("SwiftFormerModel", _pixels()),
    _Entry("TextNetModel", _pixels()),
    _Entry("UperNetForSemanticSegmentation", _pixels()),
    _Entry(
        "UVDocModel",
        _pixels(),
        config={"backbone_config": {"model_type": "uvdoc_backbone", "out_indices": [*range(1, 7)]}},
    ),
    _Entry(
        "VitMatteForImageMatting",
        _pixels(4, 224, 224),
        config={
            "backbone_config": {
                "model_type": "vitdet",
                "num_channels": 4,
                "hidden_size": 384,
                "out_features": ["stage4"],
            },
            "fusion_hidden_sizes": [256, 128, 64, 32],
            "convstream_hidden_sizes": [48, 96, 192],
        },
    ),
    _Entry("VitPoseForPoseEstimation", _pixels(3, 256, 192), config={"use_simple_decoder": False}),
    _Entry(
        "ZoeDepthForDepthEstimation",
        _pixels(3, 384, 384),
        config={"use_batch_norm_in_fusion_residual": True},
    ),
    _Entry("ClapAudioModel", _floats(input_features=(1, 1001, 64))),
    _Entry("Emu3VQVAE", lambda model, n: {"pixel_values": torch.rand(n, 4, 3, 64, 64)}, "encoder"),
    _Entry(
        "FastSpeech2ConformerModel",
        lambda model, n: {
            "input_ids": _tokens(n),
            "spectrogram_labels": torch.rand(n, 16, model.config.num_mel_bins),
            "duration_labels": torch.full((n, 8), 2),
            "pitch_labels": torch.rand(n, 8, 1),
            "energy_labels": torch.rand(n, 8, 1),
        },
        device="cpu",
    ),
    _Entry(
        "GraniteSpeechForConditionalGeneration",
        lambda model, n: {"hidden_states": torch.rand(n, 100, 160)},
        "model.encoder",
    ),
    _Entry("GraniteSpeech5ForCTC", _floats(input_features=(100, 320))),
    _Entry(
        "GraniteSpeechPlusForConditionalGeneration",
        lambda model, n: {"hidden_states": torch.rand(n, 100, 160)},
        "model.encoder",
    ),
    _Entry(
        "HubertModel",
        _floats(input_values=(4000,)),
        device="cpu",
        config={"conv_pos_batch_norm": True, **_SPEECH},
    ),
    _Entry(
        "InformerModel",
        lambda model, n: {
            "past_values": torch.rand(n, 24 + 7),
            "past_time_features": torch.rand(n, 24 + 7, 2),
            "past_observed_mask": torch.ones(n, 24 + 7),
            "future_values": torch.rand(n, 24),
            "future_time_features": torch.rand(n, 24, 2),
        },
        device="cpu",
        config={"prediction_length": 24, "num_time_features": 2, "use_cache": False},
    ),
    _Entry("LasrForCTC", _floats(input_features=(100, 128)), device="cpu"),
    _Entry("ParakeetForCTC", _floats(input_features=(100, 80)), device="cpu"),
    _Entry("PatchTSMixerModel", _floats(past_values=(32, 1)), config={"norm_mlp": "BatchNorm"}),
    _Entry("PatchTSTModel", _floats(past_values=(32, 1))),
    _Entry("Sam3LiteTextTextModel", lambda model, n: {"input_ids": _tokens(n)}),
    _Entry(
        "SeamlessM4TModel",
        lambda model, n: {"input_features": torch.rand(n, 40, 160)},
        "speech_encoder",
        device="cpu",
        config={"speech_encoder_layers": 2, "decoder_layers": 1, "encoder_layers": 1},
    ),
    _Entry(
        "SpeechT5ForTextToSpeech",
        lambda model, n: {
            "input_ids": _tokens(n),
            "decoder_input_values": torch.rand(n, 8, 80),
            "speaker_embeddings": torch.rand(n, 512),
        },
        device="cpu",
        # No graph can return a cache, and its dropout draws in eval mode too.
        config={
            "encoder_layers": 1,
            "decoder_layers": 1,
            "use_cache": False,
            "speech_decoder_prenet_dropout": 0.0,
        },
    ),
    _Entry("Wav2Vec2ConformerModel", _floats(input_values=(4000,)), device="cpu", config=_SPEECH),
)
