"""Dynamic axes: what the user asked for, what ``torch.export`` wants, and the names in the file."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import Dim

from bnrewrite.errors import ExportError
from bnrewrite.export.arguments import Example
from bnrewrite.export.plain import forward_signature

Axes = tuple[dict[int, Any], ...]
"""For each input: what was asked for each of its dynamic axes."""


def read_dynamic_shapes(model: nn.Module, example: Example, given: object) -> Axes:
    """Reads ``dynamic_shapes`` into one dictionary per input.

    Args:
        model: the model, for the arguments of its forward.
        example: the inputs.
        given: None; a mapping from forward's argument names to axes; or a sequence in the order of
            the inputs. Axes are a mapping from numbers, or a sequence with one entry per axis; an
            entry is a name, a ``torch.export.Dim``, ``Dim.AUTO``, ``Dim.DYNAMIC``, or None.

    Raises:
        TypeError: something has the wrong type.
        ExportError: an argument or an axis does not exist.
    """
    if given is None:
        return tuple({} for _ in example.names)
    if isinstance(given, Mapping):
        by_name = _by_name(model, example, given)
        for name in by_name:
            if name not in example.names:
                raise ExportError(
                    f"dynamic_shapes names the argument {name!r}, but the inputs are "
                    f"{', '.join(example.names)}. Use the names of forward's arguments."
                )
        entries = [by_name.get(name) for name in example.names]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != len(example.names):
            raise ExportError(
                f"dynamic_shapes has {len(given)} entries, but there are {len(example.names)} "
                f"inputs: {', '.join(example.names)}. Give one entry for each, None if static; "
                "arguments that are no tensors are constants of the file and have none."
            )
        entries = list(given)
    else:
        raise TypeError(
            "dynamic_shapes must map argument names to axes, or be a sequence with one entry per "
            f"input, but it is {type(given).__name__}."
        )
    axes = tuple(
        _axes(name, tensor, entry)
        for name, tensor, entry in zip(example.names, example.tensors, entries, strict=True)
    )
    _check_equal_names(example, axes)
    return axes


def _check_equal_names(example: Example, axes: Axes) -> None:
    """Refuses one name for axes that differ in the example."""
    first: dict[str, tuple[str, int]] = {}
    for name, tensor, one in zip(example.names, example.tensors, axes, strict=True):
        for axis, what in one.items():
            called = root_name(what)
            if called is None:
                continue
            place = f"axis {axis} of {name!r}"
            size = _root_size(place, what, tensor.shape[axis])
            other, there = first.setdefault(called, (place, size))
            if size != there:
                raise ExportError(
                    f"{place} and {other} are both called {called!r} in dynamic_shapes, but in the "
                    f"example they are {size} and {there}. Give them different names, or pass an "
                    "example in which they are equal."
                )


def _root_size(place: str, what: Any, size: int) -> int:
    """The size that makes a derived axis ``size``, as 4 for ``4*h`` makes it 16."""
    if root_name(what) == axis_name(what):
        return size
    zero, one = what.fn(0), what.fn(1)
    if (size - zero) % (one - zero):
        raise ExportError(
            f"{place} is {axis_name(what)} in dynamic_shapes, but its size in the example is "
            f"{size}, which no {root_name(what)} gives. Pass an example that fits, or another Dim."
        )
    return (size - zero) // (one - zero)


def _by_name(model: nn.Module, example: Example, given: Mapping[Any, Any]) -> dict[str, Any]:
    """Entries by the names of inputs; those for several inputs are spread over their names."""
    parameters = forward_signature(model).parameters
    found: dict[str, Any] = {}
    for name, entry in given.items():
        kind = parameters[name].kind if name in parameters else None
        if kind is inspect.Parameter.VAR_KEYWORD and isinstance(entry, Mapping):
            for key, one in entry.items():
                found.update(_spread(key, one, example.names))
        elif kind is inspect.Parameter.VAR_POSITIONAL and not entry:
            # The example has none, or none of them varies.
            continue
        elif entry is not None or name not in parameters:
            found.update(_spread(name, entry, example.names))
    return found


def _spread(name: str, entry: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """An entry for ``*args``, or for a list or dict of inputs, as one for each."""
    if name in names or not any(one.startswith(f"{name}_") for one in names):
        yield name, entry
        return
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(entry, Mapping):
        parts = entry.items()
    elif isinstance(entry, Sequence) and not isinstance(entry, str):
        parts = enumerate(entry)
    elif entry is not None:
        yield name, entry
    for key, one in parts:
        # Constants have no axes.
        if one is not None:
            yield from _spread(f"{name}_{key}", one, names)


def _axes(name: str, tensor: Tensor, entry: object) -> dict[int, Any]:
    if entry is None:
        return {}
    if isinstance(entry, Sequence) and not isinstance(entry, str):
        if len(entry) != tensor.dim():
            raise ExportError(
                f"dynamic_shapes gives {len(entry)} axes for {name!r}, which has {tensor.dim()}."
            )
        entry = dict(enumerate(entry))
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"dynamic_shapes for {name!r} must map axes to names or Dims, but it is "
            f"{type(entry).__name__} ({entry!r}). Write e.g. {{{name!r}: {{0: 'batch'}}}}."
        )
    axes: dict[int, Any] = {}
    for axis, what in entry.items():
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"an axis of {name!r} in dynamic_shapes is {axis!r}, not an integer.")
        if not 0 <= axis < tensor.dim():
            raise ExportError(
                f"dynamic_shapes names axis {axis} of {name!r}, which has {tensor.dim()} axes, "
                f"numbered from 0 to {tensor.dim() - 1}."
            )
        if what is None or isinstance(what, int) or what is Dim.STATIC:
            if isinstance(what, int) and what != tensor.shape[axis]:
                raise ExportError(
                    f"dynamic_shapes fixes axis {axis} of {name!r} to {what}, but its size in the "
                    f"example is {tensor.shape[axis]}."
                )
            continue
        if not isinstance(what, (str, Dim, type(Dim.DYNAMIC))) or what == "":
            raise TypeError(
                f"axis {axis} of {name!r} in dynamic_shapes is {what!r}. Give a name, a "
                "torch.export.Dim, or None."
            )
        axes[axis] = what
    return axes


def torch_shapes(axes: Axes) -> list[dict[int, Any]]:
    """What ``torch.export`` takes: names become ``Dim.DYNAMIC``, so that it infers their range."""
    return [
        {axis: Dim.DYNAMIC if isinstance(what, str) else what for axis, what in one.items()}
        for one in axes
    ]


def axis_name(what: Any) -> str | None:
    """The name that the user gave to an axis; None for ``Dim.AUTO`` and ``Dim.DYNAMIC``."""
    if isinstance(what, str):
        return what
    return getattr(what, "__name__", None) if isinstance(what, Dim) else None


def root_name(what: Any) -> str | None:
    """As :func:`axis_name`, but ``h`` for a derived axis such as ``4*h``."""
    return axis_name(getattr(what, "root", what))
