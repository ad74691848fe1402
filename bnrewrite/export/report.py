"""The result of an export, as numbers and as text."""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """An input or output of the exported graph.

    Attributes:
        name: its name in the file.
        dtype: ONNX name of its element type, e.g. ``"float"`` or ``"float16"``.
        shape: sizes; names for dynamic axes.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What ``export_onnx`` wrote.

    Attributes:
        path: the file; None if none was asked for.
        external_data: the file beside it that holds the weights; None if the model file holds them.
        opset: version of the standard operators.
        ir_version: version of the file format.
        num_nodes: number of nodes in the graph.
        num_batch_norm: number of BatchNormalization nodes in the graph.
        num_folded: number of BatchNorm layers folded into the layer before them.
        num_batch_stats: number of BatchNorm layers without running statistics, which use those of
            the batch.
        verified: batch sizes at which onnxruntime and the model agreed; empty if nothing was
            compared.
        unverified: why nothing was compared; "" if something was.
        max_abs: largest absolute difference from the model; None if nothing was compared.
        max_rel: largest difference relative to the scale of its output; None if nothing was
            compared.
        inputs: inputs of the graph.
        outputs: outputs of the graph.
        ranges: limits of dynamic axes, by axis name: the smallest and the largest size (None for
            no limit). Beyond them the model behaves differently or fails.
        model: the ONNX model if no path was given.
    """

    path: str | None
    external_data: str | None
    opset: int
    ir_version: int
    num_nodes: int
    num_batch_norm: int
    num_folded: int
    num_batch_stats: int
    verified: tuple[int, ...]
    unverified: str
    max_abs: float | None
    max_rel: float | None
    inputs: tuple[TensorReport, ...]
    outputs: tuple[TensorReport, ...]
    ranges: dict[str, tuple[int, int | None]] = dataclasses.field(default_factory=dict)
    model: "ModelProto | None" = dataclasses.field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists and strings, without the model."""
        found = dataclasses.asdict(dataclasses.replace(self, model=None))
        del found["model"]
        return found

    def __str__(self) -> str:
        lines = [
            f"{self.path or 'ONNX model'}: opset {self.opset}, IR version {self.ir_version}, "
            f"{self.num_nodes} nodes",
            f"  BatchNormalization  {self.num_batch_norm} kept, {self.num_folded} folded, "
            f"{self.num_batch_stats} computed from batch statistics",
        ]
        for kind, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            lines.append(f"  {kind:18}  {', '.join(map(str, tensors))}")
        if self.ranges:
            lines.append(f"  only for            {', '.join(map(_range, self.ranges.items()))}")
        if self.external_data:
            lines.append(f"  weights             {self.external_data}")
        if self.verified:
            sizes = " and ".join(map(str, self.verified))
            lines.append(
                f"  verified            against the model with onnxruntime, batch size {sizes}: "
                f"largest difference {self.max_abs:.2g}, {self.max_rel:.2g} of the output's scale"
            )
        else:
            lines.append(f"  not verified        {self.unverified}; onnx.checker passed")
        return "\n".join(lines)


def _range(named: tuple[str, tuple[int, int | None]]) -> str:
    name, (least, largest) = named
    return f"{name} from {least}" + ("" if largest is None else f" to {largest}")
