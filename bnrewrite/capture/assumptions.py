"""What a trace took for granted: a captured graph stands for the forward while it still holds."""

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn

from bnrewrite.passes.base import joined
from bnrewrite.sites.classes import below, original_class
from bnrewrite.sites.floor import has_hooks

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_INTERNAL = frozenset(name for name in vars(nn.Module()) if name not in ("training", "_modules"))
_TABLES = ("_parameters", "_buffers", "_modules")

Place = tuple[str, str]
"""Path of a module below the owner ("" is the owner) and the name of one of its attributes."""


@dataclasses.dataclass
class Assumptions:
    """What the trace of one owner baked into its graph.

    Attributes:
        constants: plain attributes that were read, with their values: numbers, names, functions,
            and tuples, lists, sets and dicts of them.
        objects: other attributes that were read; the same object stands for the same behaviour.
        held: plain attributes of these that were read, by path, name and attribute.
        absent: parameters, buffers and children that were read and are None.
        present: those that were read and are not None, by path.
        missing: names that were asked for and nothing had.
        inherited: what was read from a class, and could be hidden by an attribute.
        lengths: modules whose children were enumerated, with how many there were.
        containers: lists, sets and dicts that were read, with copies from before the trace.
        reads_training: whether any ``training`` flag was read.
        reads_own_training: whether that of the owner was.
        classes: modules whose forwards became part of the graph, by path, with their classes.
        layers: modules whose results were taken for tensors, by path, with their classes.
    """

    constants: dict[Place, Any] = dataclasses.field(default_factory=dict)
    objects: dict[Place, Any] = dataclasses.field(default_factory=dict)
    held: dict[tuple[str, str, str], Any] = dataclasses.field(default_factory=dict)
    absent: set[Place] = dataclasses.field(default_factory=set)
    present: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    missing: set[Place] = dataclasses.field(default_factory=set)
    inherited: dict[Place, Any] = dataclasses.field(default_factory=dict)
    lengths: dict[str, int] = dataclasses.field(default_factory=dict)
    containers: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    reads_training: bool = False
    reads_own_training: bool = False
    classes: dict[str, type] = dataclasses.field(default_factory=dict)
    layers: dict[str, type] = dataclasses.field(default_factory=dict)

    def note(self, path: str, module: nn.Module, name: str, value: Any) -> None:
        """Notes that the traced code read the attribute ``name`` of ``module``."""
        if name in _INTERNAL:
            return
        if name == "_modules":
            self.lengths[path] = len(value)
        elif name == "training":
            self.reads_training = True
            if path:
                self.constants[path, name] = value
            else:
                self.reads_own_training = True
        elif name in module.__dict__:
            if (path, name) in self.constants or (path, name) in self.objects:
                # What the traced code has done to a container since is not what was read.
                return
            if isinstance(value, (list, dict, set)):
                self.containers.append((value, value.copy()))
            if _is_constant(value):
                self.constants[path, name] = _copied(value)
            else:
                self.objects[path, name] = value
        elif not hasattr(nn.Module, name):
            self.inherited[path, name] = getattr(original_class(module), name, None)

    def note_held(self, place: Place, attribute: str, value: Any) -> None:
        """Notes that the traced code read an attribute of the object at ``place``."""
        if _is_constant(value):
            self.held.setdefault((*place, attribute), _copied(value))

    def note_member(self, path: str, module: nn.Module, name: str) -> None:
        """Notes that the traced code asked for a parameter, buffer or child, which may be None."""
        for table in _TABLES:
            members = module.__dict__.get(table, {})
            if name in members and members[name] is None:
                self.absent.add((path, name))
            elif name in members:
                self.present.setdefault(path, set()).add(name)

    def add(self, other: "Assumptions", path: str) -> None:
        """Adds what the trace in training of the module at ``path`` baked in."""
        for name in ("constants", "objects", "inherited"):
            ours, theirs = getattr(self, name), getattr(other, name)
            ours.update({(joined(path, at), what): value for (at, what), value in theirs.items()})
        for (at, what, attribute), value in other.held.items():
            self.held[joined(path, at), what, attribute] = value
        for name in ("absent", "missing"):
            getattr(self, name).update(
                (joined(path, at), what) for at, what in getattr(other, name)
            )
        for name in ("lengths", "classes", "layers"):
            ours, theirs = getattr(self, name), getattr(other, name)
            ours.update({joined(path, at): value for at, value in theirs.items()})
        for at, names in other.present.items():
            self.present.setdefault(joined(path, at), set()).update(names)
        self.containers.extend(other.containers)
        self.reads_training |= other.reads_training
        if other.reads_own_training and path:
            self.constants[path, "training"] = True
        self.reads_own_training |= other.reads_own_training and not path

    def hold(self, owner: nn.Module) -> bool:
        """Whether the graph still does what the forward of the owner would do.

        Raises:
            AttributeError: a module that the trace has seen is gone.
        """
        for path, cls in self.classes.items():
            module = below(owner, path)
            if original_class(module) is not cls or has_hooks(module):
                return False
        for path, cls in self.layers.items():
            if original_class(below(owner, path)) is not cls:
                return False
        for (path, name), before in self.constants.items():
            values = below(owner, path).__dict__
            if name not in values or not _same(values[name], before):
                return False
        for (path, name, attribute), before in self.held.items():
            values = below(owner, path).__dict__
            if name not in values or not _same(getattr(values[name], attribute), before):
                return False
        for path, name in self.absent:
            if getattr(below(owner, path), name) is not None:
                return False
        for path, names in self.present.items():
            module = below(owner, path)
            if any(getattr(module, name) is None for name in names):
                return False
        for path, name in self.missing:
            if hasattr(below(owner, path), name):
                return False
        for (path, name), before in self.inherited.items():
            module = below(owner, path)
            value = getattr(type(module), name, None)
            if name in module.__dict__ or (value is not before and value != before):
                return False
        return all(len(below(owner, path)._modules) == n for path, n in self.lengths.items())

    def hold_for_another(self, module: nn.Module) -> bool:
        """Whether a trace of ``module``, of the same class and structure, would be the same."""
        try:
            return self.hold(module) and all(
                below(module, path).__dict__.get(name) is value
                for (path, name), value in self.objects.items()
            )
        except AttributeError:
            return False

    def restore_containers(self) -> bool:
        """Undoes what the traced code did to lists, sets and dicts; whether it did anything."""
        changed = False
        for live, before in self.containers:
            if list(live) != list(before):
                changed = True
                live.clear()
                (live.extend if isinstance(live, list) else live.update)(before)
        return changed


def _is_constant(value: Any) -> bool:
    """Whether equal values of the type of ``value`` stand for the same behaviour."""
    if type(value) is dict:
        return all(map(_is_constant, value)) and all(map(_is_constant, value.values()))
    if type(value) in (list, set):
        return all(map(_is_constant, value))
    if isinstance(value, tuple):
        return all(_is_constant(one) and not isinstance(one, (list, set, dict)) for one in value)
    return isinstance(value, _CONSTANTS) or inspect.isroutine(value)


def _copied(value: Any) -> Any:
    """A constant that stays as it is."""
    if type(value) is dict:
        return {key: _copied(one) for key, one in value.items()}
    if type(value) is list:
        return [_copied(one) for one in value]
    return value.copy() if type(value) is set else value


def _same(value: Any, before: Any) -> bool:
    return value is before or (type(value) is type(before) and value == before)
