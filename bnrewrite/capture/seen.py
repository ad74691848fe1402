"""What a value looked like when traced code read it, to tell later whether another looks the same.

Not identity: modules of one structure share a graph, and copies of a model have copies of what its
modules hold. Of an object only the attributes count that were read, of a list, set or dict all of
it.
"""

import dataclasses
import itertools
import types
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnrewrite.capture.values import (
    CONTAINERS,
    METHODS_IN_C,
    MISSING,
    described,
    is_method,
    is_plain,
    of_array,
    parts,
    same,
)
from bnrewrite.guards import is_compiling
from bnrewrite.sites.classes import below, original_class

_numbers = itertools.count(1)


class Comparison:
    """One comparison of what a trace has seen with what is there now.

    Args:
        owner: the module at which paths begin; None if none is below it.
        met: what was found, by the number of what was seen.
    """

    def __init__(self, owner: nn.Module | None, met: dict[int, Any] | None = None) -> None:
        self.owner = owner
        self.met: dict[int, Any] = {} if met is None else met
        self._known: set[int] = set()

    def is_apart(self, module: nn.Module) -> bool:
        """Whether ``module`` is not below the owner, and none that was met before."""
        inside = () if self.owner is None else self.owner.modules()
        if is_compiling():
            # A compiler knows identities only by comparing.
            return not any(module is other for other in (*inside, *self.met.values()))
        if not self._known:
            self._known.update(map(id, inside))
        if id(module) in self._known:
            return False
        self._known.add(id(module))
        return True


@dataclasses.dataclass(frozen=True)
class Seen:
    """A value that stands for itself: a constant, a function, or what nobody can look into."""

    value: Any

    def matches(self, value: Any, now: Comparison) -> bool:
        """Whether ``value`` looks the same."""
        return same(value, self.value)


@dataclasses.dataclass(frozen=True)
class _SeenParts(Seen):
    """A container or an object: ``value`` is its class; parts are elements, and attributes.

    Attributes:
        keys: what tells elements apart, as it is or as it was seen.
        elements: in order.
        attributes: those that were read.
        inside: places of elements that are modules below the owner. Where these differ among the
            blocks of a network, nothing else needs to be compared.
        number: by which what is inside it may refer to it.
    """

    keys: tuple[Any, ...] = ()
    elements: tuple[Seen, ...] = ()
    attributes: tuple[tuple[str, Seen], ...] = ()
    inside: tuple[int, ...] = ()
    number: int = dataclasses.field(default=0, compare=False)

    def matches(self, value: Any, now: Comparison) -> bool:
        if type(value) is not self.value:
            return False
        now.met[self.number] = value
        return self.parts_match(value, now)

    def parts_match(self, value: Any, now: Comparison) -> bool:
        """Whether ``value``, which is of the class, has the same parts."""
        keys, elements = parts(value)
        if len(elements) != len(self.elements):
            return False
        for place in self.inside:
            if not self.elements[place].matches(elements[place], now):
                return False
        if len(keys) != len(self.keys):
            return False
        for key, before in zip(keys, self.keys, strict=True):
            if not (before.matches(key, now) if isinstance(before, Seen) else same(key, before)):
                return False
        for seen, element in zip(self.elements, elements, strict=True):
            if not seen.matches(element, now):
                return False
        for name, seen in self.attributes:
            if not seen.matches(getattr(value, name, MISSING), now):
                return False
        return True


@dataclasses.dataclass(frozen=True)
class _SeenApart(_SeenParts):
    """A module that is not below the owner: ``value`` is its class from before conversion.

    Code may compare modules and find things by them, so two are the same if they were.
    """

    def matches(self, value: Any, now: Comparison) -> bool:
        if self.number in now.met:
            return now.met[self.number] is value
        if not isinstance(value, nn.Module) or original_class(value) is not self.value:
            return False
        if not now.is_apart(value):
            return False
        now.met[self.number] = value
        return self.parts_match(value, now)


@dataclasses.dataclass(frozen=True)
class _SeenAgain(Seen):
    """What holds this very value, at some place further out."""

    number: int = dataclasses.field(compare=False)

    def matches(self, value: Any, now: Comparison) -> bool:
        return now.met.get(self.number) is value


@dataclasses.dataclass(frozen=True)
class _SeenTensor(Seen):
    """A tensor, whose values a trace cannot read: ``value`` is what it can."""

    def matches(self, value: Any, now: Comparison) -> bool:
        return isinstance(value, Tensor) and described(value) == self.value


@dataclasses.dataclass(frozen=True)
class _SeenArray(Seen):
    """An array of numpy: ``value`` is its dtype, shape and bytes."""

    def matches(self, value: Any, now: Comparison) -> bool:
        # For a compiler it is a tensor, whose values it does not know.
        compiling = is_compiling()
        return not compiling and isinstance(value, np.ndarray) and of_array(value) == self.value


@dataclasses.dataclass(frozen=True)
class _SeenModule(Seen):
    """A module below the owner: ``value`` is its path."""

    def matches(self, value: Any, now: Comparison) -> bool:
        return now.owner is not None and below(now.owner, self.value) is value


@dataclasses.dataclass(frozen=True)
class _SeenMethod(Seen):
    """A method of a module or an object, which is not kept: ``value`` is its function.

    Attributes:
        of: what the method belongs to.
    """

    of: Seen

    def matches(self, value: Any, now: Comparison) -> bool:
        if type(value) is not types.MethodType or value.__func__ is not self.value:
            return False
        return self.of.matches(value.__self__, now)


@dataclasses.dataclass(frozen=True)
class _SeenMethodInC(Seen):
    """A method of a container: ``value`` is its name."""

    of: Seen

    def matches(self, value: Any, now: Comparison) -> bool:
        return (
            isinstance(value, METHODS_IN_C)
            and value.__name__ == self.value
            and self.of.matches(value.__self__, now)
        )


@dataclasses.dataclass(frozen=True)
class SeenBelow(Seen):
    """What a module saw whose graph became part of an owner's: ``value`` is its path."""

    seen: Seen

    def matches(self, value: Any, now: Comparison) -> bool:
        """Whether ``value`` looks the same, with paths below that module."""
        owner = None if now.owner is None else below(now.owner, self.value)
        return self.seen.matches(value, Comparison(owner, now.met))


class Looks:
    """Makes :class:`Seen` of values.

    Args:
        paths: of the modules below the owner, by identity.
        attributes: what was read of objects, by identity and name.
        copies: of containers, by identity, from before the trace.

    Attributes:
        met_inside: whether any value was, or held, a module below the owner.
    """

    def __init__(
        self, paths: dict[int, str], attributes: dict[int, dict[str, Any]], copies: dict[int, Any]
    ) -> None:
        self._paths = paths
        self._attributes = attributes
        self._copies = copies
        self._open: dict[int, int] = {}
        self._modules: dict[int, Seen] = {}
        self.met_inside = False

    def of(self, value: Any) -> Seen:
        """What ``value`` looked like."""
        if isinstance(value, Tensor):
            return _SeenTensor(described(value))
        if id(value) in self._paths:
            self.met_inside = True
            return _SeenModule(self._paths[id(value)])
        if id(value) in self._modules:
            return self._modules[id(value)]
        if isinstance(value, types.MethodType):
            # Copies of a module have methods of their own.
            return _SeenMethod(value.__func__, self.of(value.__self__))
        if is_method(value):
            return _SeenMethodInC(value.__name__, self.of(value.__self__))
        if isinstance(value, np.ndarray):
            return _SeenArray(of_array(value))
        read = self._attributes.get(id(value), {})
        if not (isinstance(value, (*CONTAINERS, nn.Module)) or read):
            return Seen(value)
        if id(value) in self._open:
            return _SeenAgain(type(value), self._open[id(value)])
        number = self._open[id(value)] = next(_numbers)
        keys, elements = self._copies.get(id(value)) or parts(value)
        inside = (place for place, one in enumerate(elements) if id(one) in self._paths)
        seen = (_SeenApart if isinstance(value, nn.Module) else _SeenParts)(
            original_class(value) if isinstance(value, nn.Module) else type(value),
            tuple(key if is_plain(key) else self.of(key) for key in keys),
            tuple(map(self.of, elements)),
            tuple((name, self.of(one)) for name, one in read.items()),
            tuple(inside),
            number,
        )
        del self._open[id(value)]
        if isinstance(value, nn.Module):
            self._modules[id(value)] = seen
        return seen
