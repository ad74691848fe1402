"""Exports models of the zoo to ONNX in both forms, with dynamic batch, verified by onnxruntime."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import bnrewrite
from tests.parity import seed, tensors
from tests.zoo.spec import Spec


@dataclasses.dataclass
class Exported:
    """What became of the export of one model.

    Attributes:
        num_kept: BatchNormalization nodes of the kept form.
        num_folded: of these, folded in the folded form.
        num_batch_stats: layers without running statistics.
        batch_sizes: that onnxruntime agreed on, in both forms.
        kept_difference: largest difference from the model, relative to the scale of its output.
        folded_difference: the same of the folded form.
        seconds: both exports, with running the model.
        error: why there is none; "" if all is well.
    """

    num_kept: int = 0
    num_folded: int = 0
    num_batch_stats: int = 0
    batch_sizes: tuple[int, ...] = ()
    kept_difference: float | None = None
    folded_difference: float | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def passes(self) -> bool:
        """Whether both forms were written and agree with the model on two batch sizes."""
        return not self.error and len(self.batch_sizes) == 2

    def __str__(self) -> str:
        if self.error:
            return f"NO EXPORT {self.error}"
        batch = "" if len(self.batch_sizes) == 2 else ", ONE BATCH SIZE ONLY"
        return (
            f"export {self.num_kept} kept, {self.num_folded} folded, {self.num_batch_stats} from "
            f"the batch; {self.kept_difference:.1e} and {self.folded_difference:.1e}{batch}; "
            f"{self.seconds:.0f} s"
        )


def export(spec: Spec) -> Exported:
    """Exports the model of ``spec``, converted, in training mode, on the CPU, in both forms."""
    row = Exported()
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # Libraries warn about deprecations of each other.
            warnings.simplefilter("ignore")
            _export(dataclasses.replace(spec, device="cpu"), row)
    except Exception as error:
        first = (str(error).strip() or "no message").split("\n", 1)[0]
        row.error = f"{type(error).__name__}: {first}"
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _export(spec: Spec, row: Exported) -> None:
    seed(0)
    model = bnrewrite.convert(mild_statistics(spec.build()))
    args, kwargs = spec.call(model)
    dynamic = list(spec.axes) or [{0: "batch"} for _ in tensors((args, kwargs))]
    with _converted_once():
        kept = bnrewrite.export_onnx(model, args, kwargs=kwargs, dynamic_shapes=dynamic)
        row.num_kept, row.num_batch_stats = kept.num_batch_norm, kept.num_batch_stats
        row.kept_difference = kept.max_rel
        _check_parameters(model, kept.model)
        folded = bnrewrite.export_onnx(
            model, args, kwargs=kwargs, dynamic_shapes=dynamic, fold=True
        )
    row.num_folded, row.folded_difference = folded.num_folded, folded.max_rel
    row.batch_sizes = min(kept.verified, folded.verified, key=len)
    if folded.num_batch_norm + folded.num_folded != kept.num_batch_norm:
        raise AssertionError(
            f"{kept.num_batch_norm} BatchNormalization nodes became {folded.num_batch_norm} kept "
            f"and {folded.num_folded} folded"
        )


@contextlib.contextmanager
def _converted_once() -> Iterator[None]:
    """Lets both forms start from what torch makes of the model, most of the time of an export.

    The steps are the same for both up to there, and give the same.
    """
    from bnrewrite.export import pipeline, translate

    trace, to_onnx = pipeline.trace, translate.to_onnx
    traced: list[Any] = []
    converted: list[Any] = []

    def trace_once(*arguments: Any) -> Any:
        # The plain copy that is traced is another one each time.
        if not traced:
            traced.append(trace(*arguments))
        return traced[0]

    def convert_once(*arguments: Any) -> Any:
        if not converted:
            converted.append(to_onnx(*arguments))
        # The steps that follow change it.
        return converted[0].clone()

    with (
        mock.patch.object(pipeline, "trace", trace_once),
        mock.patch.object(translate, "to_onnx", convert_once),
    ):
        yield


def _check_parameters(model: nn.Module, proto: Any) -> None:
    """The kept form holds parameters of the model under their names with their own values."""
    from onnx import numpy_helper

    state = model.state_dict()
    for one in proto.graph.initializer:
        value = torch.from_numpy(numpy_helper.to_array(one).copy())
        if one.name in state and not torch.equal(value, state[one.name]):
            raise AssertionError(f"{one.name} has another value than in the state_dict")


def mild_statistics(model: Any) -> Any:
    """Random statistics and affine parameters with which deep models neither explode nor die."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _fill((module.weight, module.running_var), 0.8, 1.25, generator)
            _fill((module.bias, module.running_mean), -0.1, 0.1, generator)
    return model


def _fill(
    some: tuple[Tensor | None, ...], low: float, high: float, generator: torch.Generator
) -> None:
    for tensor in some:
        if tensor is not None:
            tensor.data.uniform_(low, high, generator=generator)
