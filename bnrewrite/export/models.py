"""What can be said about a model before it runs: is it one, and can its tensors be exported."""

import importlib.util
import sys

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedTensorMixin

from bnrewrite.errors import ExportError
from bnrewrite.naming import ITSELF

_BFLOAT16_OPSET = 22


def check_model(model: object) -> None:
    """Refuses what is no module that can be traced.

    Raises:
        TypeError: it is not an ``nn.Module``.
        ExportError: it is scripted.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError(
            "model is a TorchScript module, which torch.export cannot read. "
            "Pass the module that it was made from."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, but it is {type(model).__name__}. "
            "Pass the module itself."
        )


def check_packages() -> None:
    """Refuses to start where a package is missing that only the end of an export imports.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    for name in ("onnx", "onnxscript"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ImportError(
                f"export_onnx needs the package {name}, which is not installed: pip install {name}"
            )


def check_tensors(model: nn.Module, inputs: dict[str, Tensor], opset: int) -> None:
    """Refuses parameters, buffers and BatchNorm layers that cannot be exported.

    Raises:
        ExportError: names the tensor or the layer, and the way out.
    """
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ExportError(_sharded(f"{name or 'model'} (FullyShardedDataParallel)"))
    named = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in named.items():
        if isinstance(tensor, UninitializedTensorMixin):
            raise ExportError(f"{name} is lazy and not initialized. Run the model once first.")
        if tensor.is_meta:
            raise ExportError(
                f"{name} is on the meta device and holds no values. Load the weights first, e.g. "
                "with to_empty() and load_state_dict()."
            )
        if hasattr(tensor, "full_tensor"):
            raise ExportError(_sharded(name))
    for name, tensor in (*named.items(), *inputs.items()):
        if tensor.dtype == torch.bfloat16 and opset < _BFLOAT16_OPSET:
            raise ExportError(
                f"{name} is bfloat16, which most ONNX operators accept only from opset "
                f"{_BFLOAT16_OPSET} on, but opset_version is {opset}. Pass opset_version="
                f"{_BFLOAT16_OPSET}, or export model.float()."
            )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            _check_batch_norm(name or ITSELF, module)


def _sharded(name: str) -> str:
    return (
        f"{name} is sharded over a device mesh. Export an unsharded model with the state dict "
        "from torch.distributed.checkpoint.state_dict.get_model_state_dict()."
    )


def _check_batch_norm(name: str, module: _BatchNorm) -> None:
    if module.num_features == 0:
        raise ExportError(f"{name} has num_features=0: there is nothing to normalize. Remove it.")
    if (module.running_mean is None) != (module.running_var is None):
        missing = "running_mean" if module.running_mean is None else "running_var"
        raise ExportError(
            f"{name} has no {missing}, but it has the other running statistic. Give it both or "
            "neither."
        )
