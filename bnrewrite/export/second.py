"""A second example, with another batch size, to see that a dynamic batch is one."""

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnrewrite.export.arguments import Example
from bnrewrite.export.dynamic import Axes, axis_name


def second_example(
    program: ExportedProgram, example: Example, axes: Axes
) -> tuple[Tensor, ...] | None:
    """Inputs with one more sample (or one less) than ``example``; None if the batch is fixed.

    Axes that the program ties to the batch change with it, and those that have its name.
    """
    sizes = _sizes(program)
    batches = (
        size[0]
        for size, one in zip(sizes, axes, strict=True)
        if 0 in one and not isinstance(size[0], int)
    )
    batch = next(batches, None)
    if batch is None or len(batch.free_symbols) != 1:
        return None
    symbol = next(iter(batch.free_symbols))
    values = _values(sizes, example)
    if symbol not in values:
        return None
    now = values[symbol]
    tied = [one for one in _of_one_name(symbol, sizes, axes) if values.get(one) == now]
    limits = [program.range_constraints[one] for one in tied if one in program.range_constraints]
    for then in (now + 1, now - 1):
        if then >= 1 and all(one.lower <= then <= one.upper for one in limits):
            values.update(dict.fromkeys(tied, then))
            return tuple(
                _resized(
                    tensor, [one if isinstance(one, int) else int(one.subs(values)) for one in size]
                )
                for tensor, size in zip(example.tensors, sizes, strict=True)
            )
    return None


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


def _of_one_name(symbol: Any, sizes: list[list[Any]], axes: Axes) -> list[Any]:
    """``symbol`` and the symbols of the axes to which the user gave the same name."""
    names = {
        size[axis]: axis_name(what)
        for size, one in zip(sizes, axes, strict=True)
        for axis, what in one.items()
        if not isinstance(size[axis], int) and size[axis].is_Symbol
    }
    name = names.get(symbol)
    return [symbol, *(one for one in names if one != symbol and name and names[one] == name)]


def _sizes(program: ExportedProgram) -> list[list[Any]]:
    """For each input its sizes: integers, or expressions in the program's symbols."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    shapes = [nodes[str(name)].meta["val"].shape for name in program.graph_signature.user_inputs]
    return [[one if isinstance(one, int) else one.node.expr for one in shape] for shape in shapes]


def _values(sizes: list[list[Any]], example: Example) -> dict[Any, int]:
    """The value of each symbol that is the size of some axis by itself."""
    return {
        size: actual
        for shape, tensor in zip(sizes, example.tensors, strict=True)
        for size, actual in zip(shape, tensor.shape, strict=True)
        if not isinstance(size, int) and size.is_Symbol
    }


def _resized(tensor: Tensor, sizes: list[int]) -> Tensor:
    """``tensor`` with its slices repeated or left out, so that values stay in their range."""
    for axis, size in enumerate(sizes):
        if size != tensor.shape[axis]:
            index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
    return tensor
