"""Modules that traced code reads and the traced module does not contain, and what operators read.

A student holds its teacher in a list, a block the network above it, a helper is a global. What is
read of them is compared at every call, as that of other objects is. Some are made by the traced
code itself: a slice of a ``ModuleList`` is a new one.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from bnrewrite.sites.classes import original_class

NO_OPERATORS = (
    "__init__", "__new__", "__init_subclass__", "__class_getitem__", "__set_name__", "__del__",
    "__getattribute__", "__getattr__", "__setattr__", "__delattr__", "__dir__", "__sizeof__",
    "__repr__", "__setstate__", "__getstate__", "__reduce__", "__reduce_ex__", "__copy__",
    "__deepcopy__",
)  # fmt: skip
"""Special methods of modules that no operator of a forward calls."""


class ModulesApart:
    """Modules that one trace reads besides those below the traced one.

    Args:
        tracer: that records; it is asked to refuse what a graph could not stand for.
        known: values that traced code may look into, by identity; it is added to.
        see_in_class: is told of a class and a name that the traced code may read there.
        see_operators: is told of a class whose special methods the traced code may call.
        note: is told of a module, a name and what was found, or MISSING.

    Attributes:
        classes: theirs, from before conversion.
        flags: those of which ``training`` was read.
        watch: has modules of a class tell what is read of them.
    """

    def __init__(
        self,
        tracer: Any,
        known: dict[int, Any],
        see_in_class: Callable[[type, str], None],
        see_operators: Callable[[type], None],
        note: Callable[[Any, str, Any], None],
    ) -> None:
        self.classes: dict[type, None] = {}
        self.flags: dict[int, nn.Module] = {}
        self.watch: Callable[[type], None]
        self._tracer = tracer
        self._known = known
        self._see_in_class = see_in_class
        self._see_operators = see_operators
        self._note = note
        # By identity, since modules of users may have none to be found by.
        self._inside: set[int] = set()
        self._made: dict[int, nn.Module] = {}

    def start(self) -> None:
        """Notes what the traced module contains, and what operators of that may read."""
        self._inside = set(map(id, self._tracer.paths))
        for cls in dict.fromkeys(map(original_class, self._tracer.paths)):
            self._see_operators(cls)

    def see(self, module: nn.Module, names: list[str]) -> None:
        """Has a module tell which attributes are read; classes of modules are asked for names."""
        if type(module) in weakref.ProxyTypes:
            self._tracer.refuse("reads a weak reference, which other code may change")
        if id(module) in self._inside or id(module) in self._made:
            return
        self._known[id(module)] = module
        if self._tracer.kept:
            self._tracer.keep_attributes(module)
        cls = original_class(module)
        if cls not in self.classes:
            self.classes[cls] = None
            self._see_operators(cls)
            for name in names:
                self._see_in_class(cls, name)
            self.watch(type(module))

    def note(self, module: nn.Module, name: str, found: Any) -> None:
        """Notes that the traced code has read an attribute, or did not find it."""
        if id(module) in self._made or name.startswith("_bnrewrite"):
            return
        if id(module) not in self._known:
            # Something that nobody looks into has given it.
            self._tracer.refuse(f"reads {name!r} of another {type(module).__name__}")
        if name == "training":
            self.flags[id(module)] = module
            self._tracer.assumptions.reads_training = True
        self._note(module, name, found)

    def known(self) -> list[nn.Module]:
        """Those that have been seen."""
        return [one for one in self._known.values() if isinstance(one, nn.Module)]

    def made(self, module: nn.Module) -> None:
        """Notes that the traced code makes a module, of what it has read before."""
        self._made[id(module)] = module
