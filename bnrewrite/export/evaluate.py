"""What the user's model computes in eval mode."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnrewrite.errors import ExportError, UnsupportedBatchNorm
from bnrewrite.export.arguments import Example, words_of
from bnrewrite.export.untouched import untouched


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The output tensors of a model, in the order in which they are exported, and their names."""

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]


def evaluate(model: nn.Module, example: Example, tensors: tuple[Tensor, ...]) -> Outputs:
    """What ``model`` returns in eval mode.

    Args:
        model: the user's model, with any flags.
        example: the arguments; ``tensors`` take the place of its own.
        tensors: inputs, which are copied first because a forward may change them.

    Raises:
        ExportError: the model fails, or returns something that is not made of tensors.
    """
    args, kwargs = example.rebuild([tensor.detach().clone() for tensor in tensors])
    with untouched(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for module in model.modules():
            module.__dict__["training"] = False
        try:
            result = model(*args, **kwargs)
        except Exception as error:
            raise ExportError(_failure(model, example, tensors, error)) from error
    leaves = tuple(leaf.detach() for leaf in output_leaves(result))
    return Outputs(leaves, _output_names(result))


def output_leaves(result: Any) -> list[Tensor]:
    """The tensors in what a model returned.

    Raises:
        ExportError: there is something that ONNX cannot return, or no tensor at all.
    """
    leaves = pytree.tree_leaves(result)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise ExportError(
                f"the model returns an object of type {type(leaf).__name__}, which ONNX cannot "
                "hold. Return tensors, or tuples, lists and dictionaries of them, or register your "
                "class with torch.utils._pytree.register_pytree_node."
            )
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise ExportError(
            f"the model returns no tensor but {type(result).__name__}. Return the tensors that it "
            "computes."
        )
    return tensors


def _output_names(result: Any) -> tuple[str, ...]:
    """``output`` for a single tensor, else keys of dictionaries and places in tuples."""
    paths, _ = pytree.tree_flatten_with_path(result)
    found: list[str] = []
    for path, leaf in paths:
        if isinstance(leaf, Tensor):
            words = words_of(path)
            is_place = not words or words[0].isdigit()
            found.append("_".join(["output", *words] if is_place else words))
    return tuple(found)


def _failure(
    model: nn.Module, example: Example, tensors: tuple[Tensor, ...], error: Exception
) -> str:
    given = ", ".join(
        f"{name}: {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in zip(example.names, tensors, strict=True)
    )
    site = "" if isinstance(error, UnsupportedBatchNorm) else _failing_module(model, error)
    text = str(error).replace("when training", "when batch statistics are used")
    args, _ = example.rebuild(tensors)
    named = any(isinstance(arg, dict) for arg in args)
    return (
        f"the model itself fails in eval mode on the example ({given}): {site}"
        f"{type(error).__name__}: {text.rstrip('.')}. Give an example that model.eval()(*args) "
        f"accepts{'; pass named arguments in kwargs=' if named else ''}."
    )


def _failing_module(model: nn.Module, error: BaseException) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        found = names.get(id(traceback.tb_frame.f_locals.get("self"))) or found
        traceback = traceback.tb_next
    return f"in {found}: " if found else ""
