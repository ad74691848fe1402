"""Exports the trained network and compares onnxruntime with it on the test images."""

import dataclasses

import torch
from torch import Tensor

import bnrewrite
from bnrewrite.demo.data import Digits
from bnrewrite.demo.network import DigitsNet


@dataclasses.dataclass(frozen=True)
class OnnxCheck:
    """What running the exported file gave.

    Attributes:
        runtime: version of onnxruntime.
        num_images: how many test images were run.
        largest_difference: of a logit, absolute, against torch.
        largest_logit: magnitude to compare that with.
        num_same: images for which both choose the same digit.
    """

    runtime: str
    num_images: int
    largest_difference: float
    largest_logit: float
    num_same: int


def export_and_run(state: dict[str, Tensor], mode: str, test: Digits, path: str) -> OnnxCheck:
    """Exports the converted network with weights ``state`` to ``path``, in float32, and runs it.

    float32 because onnxruntime has no convolution for float64 on the CPU.
    """
    import onnxruntime

    network = DigitsNet()
    network.load_state_dict(state)
    network = bnrewrite.convert(network, mode=mode)
    images = test.images.float().cpu()
    bnrewrite.export_onnx(network, (images[:2],), path, dynamic_shapes={"x": {0: "batch"}})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    logits = torch.as_tensor(found)
    network.eval()
    with torch.no_grad():
        expected = network(images)
    return OnnxCheck(
        runtime=onnxruntime.__version__,
        num_images=len(images),
        largest_difference=(logits - expected).abs().max().item(),
        largest_logit=expected.abs().max().item(),
        num_same=int((logits.argmax(1) == expected.argmax(1)).sum()),
    )
