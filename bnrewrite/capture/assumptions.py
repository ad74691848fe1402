"""What a trace took for granted: a captured graph stands for the forward while it still holds."""

import dataclasses
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import fx, nn

from bnrewrite.capture.alike import forwards_alike
from bnrewrite.capture.outside import Outside
from bnrewrite.capture.reads import Reads
from bnrewrite.capture.seen import Comparison, SeenBelow
from bnrewrite.capture.values import CONSTANTS, CONTAINERS, described, is_method, same
from bnrewrite.passes.base import joined
from bnrewrite.sites.classes import Converted, below, is_hidden, original_class
from bnrewrite.sites.floor import has_forward_hooks, has_hooks

_INTERNAL = frozenset(name for name in vars(nn.Module()) if name not in ("training", "_modules"))
_CALL = "_wrapped_call"
"""Of an ``fx.GraphModule``: what a call goes through, which explains errors."""

_TABLES = ("_parameters", "_buffers", "_modules")

Place = tuple[str, str]
"""Path of a module below the owner ("" is the owner) and the name of one of its attributes."""


CLASS = "the class"
HOOKS = "hooks"
CHILDREN = "the children"


@dataclasses.dataclass
class Assumptions:
    """What the trace of one owner baked into its graph.

    Attributes:
        constants: plain attributes that were read, with their values.
        objects: other attributes that were read, and what they looked like.
        absent: parameters, buffers and children that were read and are None.
        present: those that were read and are not None, by path.
        missing: names that were asked for and nothing had.
        inherited: what was read from a class, and could be hidden by an attribute.
        children: modules whose children were enumerated, with their names.
        tensors: modules whose parameters or buffers were enumerated, with what these looked like.
        reads_training: whether any ``training`` flag was read.
        reads_own_training: whether that of the owner was.
        classes: modules whose forwards became part of the graph, by path, with their classes.
        layers: modules whose results were taken for tensors, or that were asked for their type, by
            path, with their classes.
        asked: modules of these whose classes may be compared, by path, with file and line.
        methods: methods of modules whose code told what they give, by path and name.
        unhooked: paths of modules whose results were taken for what the layer makes.
        instances: answers of ``isinstance`` about modules, by path and class.
        tied: names below the owner of what is one module, parameter or buffer, in pairs.
        outside: what the code read besides modules.
    """

    constants: dict[Place, Any] = dataclasses.field(default_factory=dict)
    objects: dict[Place, Any] = dataclasses.field(default_factory=dict)
    absent: set[Place] = dataclasses.field(default_factory=set)
    present: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    missing: set[Place] = dataclasses.field(default_factory=set)
    inherited: dict[Place, Any] = dataclasses.field(default_factory=dict)
    children: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tensors: dict[Place, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    reads_training: bool = False
    reads_own_training: bool = False
    classes: dict[str, type] = dataclasses.field(default_factory=dict)
    layers: dict[str, type] = dataclasses.field(default_factory=dict)
    asked: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    methods: dict[Place, Any] = dataclasses.field(default_factory=dict)
    unhooked: set[str] = dataclasses.field(default_factory=set)
    instances: dict[tuple[str, Any], bool] = dataclasses.field(default_factory=dict)
    tied: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    outside: Outside = dataclasses.field(default_factory=Outside)

    def note(self, path: str, module: nn.Module, name: str, value: Any, reads: Reads) -> None:
        """Notes that the traced code read the attribute ``name`` of ``module``."""
        if name in ("_parameters", "_buffers"):
            self.tensors[path, name] = _tensors(value)
        if name in _INTERNAL or name == "_modules":
            reads.keep(value)
        if name in _INTERNAL or name == _CALL or name.startswith("_bnrewrite"):
            return
        if name == "_modules":
            self.children[path] = tuple(value)
        elif name == "training":
            self.note_training(path, value)
        elif name in module.__dict__:
            # From Python 3.14 on, a partial is a routine, too.
            looked_into = is_method(value) or isinstance(value, CONTAINERS)
            plain = inspect.isroutine(value) and not looked_into
            constant = plain or isinstance(value, CONSTANTS)
            # What it looks like is known at the end of the trace.
            (self.constants if constant else self.objects)[path, name] = value
            reads.see(value)
        elif name == "forward":
            # That of a converted module is called as the module is, and that of one which is
            # inlined has been seen.
            if not isinstance(module, Converted) and path not in self.classes:
                self.methods[path, name] = type(module).forward
                reads.see_in_class(type(module), name)
        else:
            value = getattr(original_class(module), name, None)
            if not hasattr(nn.Module, name) or value is not getattr(nn.Module, name):
                self.inherited[path, name] = value
                reads.see_in_class(original_class(module), name)
                reads.see(value)

    def note_inlined(self, path: str, module: nn.Module) -> None:
        """Notes that the forward of ``module`` becomes part of the graph."""
        cls = self.classes[path] = original_class(module)
        if issubclass(cls, fx.GraphModule):
            # When its graph changes, the same class gets another.
            self.methods[path, "forward"] = cls.forward

    def note_training(self, path: str, value: Any) -> None:
        """Notes that the graph depends on the flag ``training`` of the module at ``path``."""
        self.reads_training = True
        if path:
            self.constants[path, "training"] = value
        else:
            self.reads_own_training = True

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
        for name in ("constants", "objects", "inherited", "tensors", "methods", "instances"):
            ours, theirs = getattr(self, name), getattr(other, name)
            ours.update({(joined(path, at), what): value for (at, what), value in theirs.items()})
        if path:
            for name in ("objects", "inherited"):
                for at, what in getattr(other, name):
                    place = joined(path, at), what
                    getattr(self, name)[place] = SeenBelow(path, getattr(self, name)[place])
        for name in ("absent", "missing"):
            getattr(self, name).update(
                (joined(path, at), what) for at, what in getattr(other, name)
            )
        for name in ("children", "classes", "layers", "asked"):
            ours, theirs = getattr(self, name), getattr(other, name)
            ours.update({joined(path, at): value for at, value in theirs.items()})
        self.unhooked.update(joined(path, at) for at in other.unhooked)
        self.tied.update((joined(path, one), joined(path, two)) for one, two in other.tied)
        for at, names in other.present.items():
            self.present.setdefault(joined(path, at), set()).update(names)
        for name in ("values", "answers", "holders"):
            getattr(self.outside, name).update(getattr(other.outside, name))
        self.reads_training |= other.reads_training
        if other.reads_own_training and path:
            self.constants[path, "training"] = True
        self.reads_own_training |= other.reads_own_training and not path

    def finish(self, owner: nn.Module, paths: dict[nn.Module, str], reads: Reads) -> None:
        """Notes, at the end of the trace, what that which it read looks like."""
        numbers = {id(module): path for module, path in paths.items()}
        looks = reads.looks(numbers)
        for places in (self.objects, self.inherited):
            places.update({place: looks.of(value) for place, value in places.items()})
        self.outside = reads.outside(reads.looks(numbers))
        # A trace knows each by one name, whatever the code calls it.
        self.tied.update(_ties(owner))
        if reads.asks_types:
            for path, names in (*self.present.items(), *self.children.items()):
                for name in names:
                    child = below(owner, path)._modules.get(name)
                    if child is not None:
                        self.layers[joined(path, name)] = original_class(child)

    def change(self, owner: nn.Module, ignored: str = "") -> Place | None:
        """What is no longer as it was in the trace; None while the graph stands for the forward.

        Args:
            owner: the module that was traced, or another one of its class and structure.
            ignored: name of an attribute that may have any value.

        Returns:
            Path of a module and the name of its attribute, or of what else has changed.

        Raises:
            AttributeError: a module that the trace has seen is gone.
        """
        for path, cls in self.classes.items():
            module = below(owner, path)
            if not _same_class(original_class(module), cls):
                return path, CLASS
            if has_hooks(module):
                return path, HOOKS
        for path, cls in self.layers.items():
            if original_class(below(owner, path)) is not cls:
                return path, CLASS
        for (path, name), function in self.methods.items():
            module = below(owner, path)
            if is_hidden(module, name) or not _same_method(
                getattr(original_class(module), name), function
            ):
                return path, name
        for path in self.unhooked:
            if has_forward_hooks(below(owner, path)):
                return path, HOOKS
        for (path, name), before in self.constants.items():
            values = below(owner, path).__dict__
            if name != ignored and (name not in values or not same(values[name], before)):
                return path, name
        now = Comparison(owner)
        for (path, name), seen in self.objects.items():
            values = below(owner, path).__dict__
            if name not in values or not seen.matches(values[name], now):
                return path, name
        for path, name in self.absent:
            if getattr(below(owner, path), name) is not None:
                return path, name
        for path, names in self.present.items():
            module = below(owner, path)
            children = module._modules
            for name in names:
                # Most are children, and found at once.
                if children.get(name) is None and getattr(module, name) is None:
                    return path, name
        for path, name in self.missing:
            if hasattr(below(owner, path), name):
                return path, name
        for (path, name), seen in self.inherited.items():
            module = below(owner, path)
            if is_hidden(module, name) or not seen.matches(
                getattr(original_class(module), name, None), now
            ):
                return path, name
        for (path, classes), answer in self.instances.items():
            if isinstance(below(owner, path), classes) is not answer:
                return path, CLASS
        for (path, name), before in self.tensors.items():
            if _tensors(below(owner, path).__dict__[name]) != before:
                return path, name
        for path, names in self.children.items():
            if tuple(below(owner, path)._modules) != names:
                return path, CHILDREN
        for one, two in self.tied:
            if _member(owner, one) is not _member(owner, two):
                return one, "identity"
        return None

    def hold_for_another(self, module: nn.Module) -> bool:
        """Whether a trace of ``module``, of the same class and structure, would be the same."""
        try:
            return self.change(module) is None
        except AttributeError:
            return False


def _ties(owner: nn.Module) -> Iterator[tuple[str, str]]:
    """Names below ``owner`` of what has another name there, with that other name."""
    for members in (owner.named_modules, owner.named_parameters, owner.named_buffers):
        first: dict[int, str] = {}
        for name, member in members(remove_duplicate=False):
            if first.setdefault(id(member), name) != name:
                yield name, first[id(member)]


def _member(owner: nn.Module, path: str) -> Any:
    """The module, parameter or buffer of this name."""
    home, _, name = path.rpartition(".")
    module = below(owner, home)
    for table in (module._modules, module._parameters, module._buffers):
        if name in table:
            return table[name]
    return module if not name else None


def _same_class(cls: type, before: type) -> bool:
    """Whether a module is of the class it had; torch makes one for each graph module and copy.

    What the graph of that is, its forward tells.
    """
    return cls is before or (
        issubclass(before, fx.GraphModule)
        and issubclass(cls, fx.GraphModule)
        and cls.__bases__ == before.__bases__
    )


def _same_method(method: Any, before: Any) -> bool:
    """Whether a class has the method that it had."""
    if method is before:
        return True
    are_functions = isinstance(method, FunctionType) and isinstance(before, FunctionType)
    return are_functions and forwards_alike(method, before)


def _tensors(members: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        (name, None if tensor is None else described(tensor)) for name, tensor in members.items()
    )
