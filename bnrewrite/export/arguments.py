"""What the user gave to ``export_onnx``, checked before any work starts."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_structure, tree_unflatten

from bnrewrite.errors import ExportError
from bnrewrite.export.plain import forward_signature

OPSETS = range(15, 27)
DEFAULT_OPSET = 18

_CONSTANTS = (bool, int, float, str, type(None))


@dataclasses.dataclass(frozen=True)
class Example:
    """Example arguments of the model: its tensors are the inputs, everything else is fixed.

    Attributes:
        names: of the inputs, after forward's arguments; ``x_0`` is the first one of a list ``x``.
        tensors: the inputs, in order.
        rebuild: ``(args, kwargs)`` from tensors in their place.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    rebuild: Callable[[Sequence[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]


def read_example(model: nn.Module, args: object, kwargs: object) -> Example:
    """Reads ``args`` and ``kwargs``.

    Raises:
        TypeError: ``args`` is no tensor or tuple, or ``kwargs`` no mapping.
        ExportError: an argument cannot be an input, or does not fit the model's forward.
    """
    if isinstance(args, Tensor):
        args = (args,)
    if not isinstance(args, tuple):
        raise TypeError(
            f"args must be a tensor or a tuple of tensors, but it is {type(args).__name__}. "
            "Pass (x,) or (x, y)."
        )
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise TypeError(
            f"kwargs must map argument names to values, but it is {type(kwargs).__name__}."
        )
    values: list[Any] = [*args, *kwargs.values()]
    places = [f"args[{index}]" for index in range(len(args))]
    places += [f"kwargs[{name!r}]" for name in kwargs]
    parts = [_parts(place, value) for place, value in zip(places, values, strict=True)]
    labels = _labels(model, args, dict(kwargs))
    leaves = [leaf for one in parts for leaf in one]
    slots = [index for index, leaf in enumerate(leaves) if isinstance(leaf.value, Tensor)]
    if not slots:
        raise ExportError(
            "there is no example input: args and kwargs hold no tensor. Pass the arguments that "
            "you call the model with, e.g. export_onnx(model, (x,), path)."
        )
    names = [label + leaf.name for label, one in zip(labels, parts, strict=True) for leaf in one]
    num_args, keys = len(args), tuple(kwargs)
    structure = tree_structure(values)

    def rebuild(tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = [leaf.value for leaf in leaves]
        for slot, tensor in zip(slots, tensors, strict=True):
            filled[slot] = tensor
        whole = tree_unflatten(filled, structure)
        return tuple(whole[:num_args]), dict(zip(keys, whole[num_args:], strict=True))

    return Example(
        tuple(_distinct([names[slot] for slot in slots], set())),
        tuple(leaves[slot].value for slot in slots),
        rebuild,
    )


class _Leaf(NamedTuple):
    """A part of an argument: ``name`` is what follows that of the argument in its own."""

    name: str
    value: Any


def _parts(place: str, value: Any) -> list[_Leaf]:
    """The tensors and constants of one argument, which may be nested in lists, tuples and dicts."""
    found = []
    for path, leaf in tree_flatten_with_path(value)[0]:
        _check_value(place + keystr(path), leaf)
        found.append(_Leaf("".join(f"_{word}" for word in words_of(path)), leaf))
    return found


def words_of(path: Iterable[Any]) -> list[str]:
    """The indices, keys and fields that lead to a part of an argument or of a result."""
    return [str(key).strip("[].'\"") for key in path]


def _check_value(place: str, value: object) -> None:
    if not isinstance(value, (Tensor, *_CONSTANTS)):
        way_out = "Wrap the model in a module that takes tensors."
        if type(value).__name__ == "ndarray":
            way_out = "Convert it with torch.from_numpy()."
        raise ExportError(
            f"{place} is of type {type(value).__name__}, but inputs of an ONNX graph are tensors. "
            + way_out
        )
    if not isinstance(value, Tensor):
        return
    shape = tuple(value.shape)
    if value.is_meta:
        raise ExportError(
            f"{place} is a meta tensor of shape {shape}, which holds no values. Pass a real one."
        )
    if value.layout is not torch.strided or value.is_quantized:
        raise ExportError(f"{place} is {value.layout}, not dense. Convert it with .to_dense().")
    if value.is_complex():
        raise ExportError(f"{place} is {value.dtype}, which ONNX operators do not accept.")
    if value.numel() == 0:
        raise ExportError(
            f"{place} has no elements: its shape is {shape}. BatchNorm would be dropped from the "
            "graph. Give an example with at least one element."
        )


def _labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Name of each argument of the call, positional ones first."""
    signature = forward_signature(model)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(
            f"the arguments do not fit forward{signature} of {type(model).__name__}: {error}."
        ) from error
    names: list[str] = []
    for name in bound.arguments:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{index}" for index in range(len(args) - len(names))]
        elif len(names) < len(args) and kind is not inspect.Parameter.VAR_KEYWORD:
            names.append(name)
    return names[: len(args)] + list(kwargs)


def check_opset(opset: object) -> int:
    """The opset to produce.

    Raises:
        TypeError: it is not an integer.
        ExportError: it is none of those that can be produced and checked.
    """
    if opset is None:
        return DEFAULT_OPSET
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(
            f"opset_version must be an integer from {OPSETS[0]} to {OPSETS[-1]}, but it is "
            f"{opset!r} ({type(opset).__name__})."
        )
    if opset not in OPSETS:
        raise ExportError(
            f"opset_version {opset} is not supported. Choose one from {OPSETS[0]} to "
            f"{OPSETS[-1]}; {DEFAULT_OPSET} is read by most runtimes."
        )
    return opset


def check_names(kind: str, names: object, count: int) -> tuple[str, ...] | None:
    """``input_names`` or ``output_names`` as a tuple of ``count`` distinct names.

    Raises:
        TypeError: they are not a sequence of strings.
        ExportError: their number is wrong, or one is empty or given twice.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"{kind} must be a sequence of names, but it is {type(names).__name__} ({names!r})."
        )
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{kind} must hold strings, but one is {type(name).__name__}.")
    if len(names) != count:
        raise ExportError(
            f"{kind} has {len(names)} name(s) {tuple(names)}, but the model has {count} "
            f"{kind.split('_', 1)[0]} tensor(s). Give one name for each."
        )
    for name in names:
        if not name:
            raise ExportError(f"{kind} holds an empty name.")
        if list(names).count(name) > 1:
            raise ExportError(f"{kind} holds the name {name!r} more than once.")
    return tuple(names)


def graph_names(
    model: nn.Module,
    inputs: tuple[tuple[str, ...] | None, tuple[str, ...]],
    outputs: tuple[tuple[str, ...] | None, tuple[str, ...]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the inputs and outputs of the graph, no two values alike.

    Args:
        model: the model; names of its parameters and buffers are taken.
        inputs: the names that the user gave, if any, and the default ones.
        outputs: likewise.

    Raises:
        ExportError: a name that the user gave is taken.
    """
    taken = {
        name: "of a parameter or buffer"
        for name, _ in (*model.named_parameters(), *model.named_buffers())
    }
    found = []
    for kind, (given, default) in (("input", inputs), ("output", outputs)):
        for name in given or ():
            if name in taken:
                raise ExportError(
                    f"{kind}_names holds {name!r}, which is already the name {taken[name]}. "
                    "Choose another one."
                )
        # The names that the user gave to outputs go before the default names of inputs.
        reserved = set(outputs[0] or ()) if kind == "input" and given is None else set()
        names = given or tuple(_distinct(default, {*taken, *reserved}))
        taken.update((name, f"of an {kind}") for name in names)
        found.append(names)
    return found[0], found[1]


def _distinct(names: Sequence[str], taken: set[str]) -> Iterator[str]:
    used = set(taken)
    for name in names:
        number, free = 0, name
        while free in used:
            number, free = number + 1, f"{name}_{number + 1}"
        used.add(free)
        yield free


def check_flag(name: str, value: object, *, optional: bool = False) -> None:
    """Refuses a flag that is not a bool, or None if it is ``optional``.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool) and not (optional and value is None):
        raise TypeError(f"{name} must be True or False, but it is {value!r}.")


def check_tolerance(name: str, value: object) -> float | None:
    """A tolerance that is None or a non-negative number.

    Raises:
        TypeError: it is not a number.
        ExportError: it is negative or not a number in the sense of IEEE 754.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or None, but it is {type(value).__name__}.")
    if not value >= 0:
        raise ExportError(f"{name} must not be negative, but it is {value}.")
    return float(value)
