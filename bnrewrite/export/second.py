"""Other examples, of other sizes, to see that a dynamic axis is one."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnrewrite.errors import ExportError
from bnrewrite.export.arguments import Example
from bnrewrite.export.dynamic import Axes, root_name
from bnrewrite.export.evaluate import Outputs, evaluate


@dataclasses.dataclass(frozen=True)
class Other:
    """Inputs of another size, and what the model returns for them.

    Attributes:
        place: the axis that is of another size, and its size.
        tensors: the inputs.
        expected: what the model returns.
    """

    place: str
    tensors: tuple[Tensor, ...]
    expected: Outputs


def other_examples(
    program: ExportedProgram, model: torch.nn.Module, example: Example, axes: Axes
) -> list[Other]:
    """For each dynamic axis inputs in which it is of another size, within the program's limits.

    Axes that the program ties to it change with it, and those that have its name. Where the model
    fails on a size, as a U-Net does on an odd one, the next is tried.

    Raises:
        ExportError: the model takes no other size.
    """
    sizes = _sizes(program)
    values = _values(sizes, example)
    found: list[Other] = []
    for index, axis, tied in _tied(sizes, values, axes):
        place, why = f"axis {axis} of {example.names[index]!r}", ""
        for tensors in _resizings(program, example, (sizes, values), tied):
            size = tensors[index].shape[axis]
            try:
                expected = evaluate(model, example, tensors)
            except ExportError as error:
                cause = error.__cause__ or error
                why = why or f" With size {size} it fails: {type(cause).__name__}: {cause}"
                continue
            found.append(Other(f"{place} of size {size}", tensors, expected))
            break
        else:
            raise ExportError(
                f"{place} cannot be dynamic: the code of the model fixes it to "
                f"{example.tensors[index].shape[axis]}. Leave it out of dynamic_shapes.{why}"
            )
    return found


def _resizings(
    program: ExportedProgram,
    example: Example,
    known: tuple[list[list[Any]], dict[Any, int]],
    tied: list[Any],
) -> Iterator[tuple[Tensor, ...]]:
    """The example with other values for ``tied``, which are equal, within the limits."""
    sizes, values = known
    now = values[tied[0]]
    steps = [sign * step for step in _STEPS for sign in (1, -1)]
    # Twice the size passes where a network halves it several times.
    candidates = [now + 1, now - 1, 2 * now, now // 2, *(now + step for step in steps)]
    for then in dict.fromkeys(candidates):
        if then < 1 or then == now:
            continue
        changed = values | dict.fromkeys(tied, then)
        limits = program.range_constraints
        if all(
            limits[one].lower <= one.subs(changed) <= limits[one].upper
            for one in (*tied, *(one for shape in sizes for one in shape))
            if one in limits and not one.free_symbols.isdisjoint(tied)
        ):
            yield tuple(
                _resized(
                    tensor,
                    [
                        now if isinstance(one, int) else int(one.subs(changed))
                        for one, now in zip(size, tensor.shape, strict=True)
                    ],
                )
                for tensor, size in zip(example.tensors, sizes, strict=True)
            )


def axis_limits(program: ExportedProgram) -> list[dict[int, tuple[int, int | None]]]:
    """For each input the least and the largest size of those dynamic axes that are limited.

    Every axis holds something: sizes of one and two are no limits that code has asked about.
    """
    found: list[dict[int, tuple[int, int | None]]] = []
    for shape in _sizes(program):
        limits: dict[int, tuple[int, int | None]] = {}
        for axis, size in enumerate(shape):
            limit = None if isinstance(size, int) else program.range_constraints.get(size)
            if limit is None:
                continue
            largest = int(limit.upper) if limit.upper < _ENDLESS else None
            if limit.lower > _FEW or largest is not None:
                limits[axis] = int(limit.lower), largest
        found.append(limits)
    return found


_FEW, _ENDLESS = 2, 2**31
_STEPS = 1, 2, 4, 8, 16, 32, 64


def _symbol(size: Any) -> Any:
    """The symbol of a size that has one; None if it has none or several."""
    symbols = () if isinstance(size, int) else tuple(size.free_symbols)
    return symbols[0] if len(symbols) == 1 else None


def _tied(
    sizes: list[list[Any]], values: dict[Any, int], axes: Axes
) -> list[tuple[int, int, list[Any]]]:
    """Input, axis and symbols of each dynamic axis that was asked for, one of each name."""
    asked = [
        (index, axis, symbol, root_name(what))
        for index, (size, one) in enumerate(zip(sizes, axes, strict=True))
        for axis, what in one.items()
        if (symbol := _symbol(size[axis])) in values
    ]
    found: list[tuple[int, int, list[Any]]] = []
    seen: set[Any] = set()
    for index, axis, symbol, name in asked:
        if symbol not in seen:
            same = [
                other
                for _, _, other, called in asked
                if name is not None and called == name and values[other] == values[symbol]
            ]
            tied = list(dict.fromkeys([symbol, *same]))
            found.append((index, axis, tied))
            seen.update(tied)
    return found


def _sizes(program: ExportedProgram) -> list[list[Any]]:
    """For each input its sizes: integers, or expressions in the program's symbols."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    shapes = [nodes[str(name)].meta["val"].shape for name in program.graph_signature.user_inputs]
    return [[one if isinstance(one, int) else one.node.expr for one in shape] for shape in shapes]


def _values(sizes: list[list[Any]], example: Example) -> dict[Any, int]:
    """The value of each symbol in a size such as ``s`` or ``4*s + 1``."""
    found: dict[Any, int] = {}
    for shape, tensor in zip(sizes, example.tensors, strict=True):
        for size, actual in zip(shape, tensor.shape, strict=True):
            symbol = _symbol(size)
            slope = None if symbol is None else size.diff(symbol)
            if slope is not None and slope.is_number:
                found[symbol] = int((actual - size.subs(symbol, 0)) / slope)
    return found


def _resized(tensor: Tensor, sizes: list[int]) -> Tensor:
    """``tensor`` with its slices repeated or left out, so that values stay in their range."""
    for axis, size in enumerate(sizes):
        if size != tensor.shape[axis]:
            index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
    return tensor
