"""One object for graphs that are the same.

Compilers compare graphs and classes by identity: equal models are compiled once only if they run
the same graphs.
"""

import sys
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from bnrewrite.sites.classes import Converted

if TYPE_CHECKING:
    from bnrewrite.capture.captured import Captured

_FIRSTS: "defaultdict[Hashable, weakref.WeakSet[Captured]]" = defaultdict(weakref.WeakSet)
_COMPILED: "OrderedDict[str, tuple[Captured, set[type]]]" = OrderedDict()
_MOST_COMPILED = 256
_looking = threading.Lock()


def first_alike(captured: "Captured") -> "Captured":
    """The living graph that does the same as ``captured`` and came first; or ``captured``."""
    shape = captured.training, len(captured.graph.nodes), tuple(captured.names)
    with _looking:
        for first in _FIRSTS[shape]:
            if captured.replaces(first):
                return first
        _FIRSTS[shape].add(captured)
        return captured


def keep_for_compilers(captured: "Captured") -> None:
    """Keeps a graph that is compiled, with the classes that run it, after their models have gone.

    The next equal model is not compiled then. Graphs that name a class which nobody could import
    any more, as one that a cell of a notebook has made anew, go with their models.
    """
    with _looking:
        _COMPILED[captured.key] = captured, set(captured.classes)
        _COMPILED.move_to_end(captured.key)
        for key, (graph, classes) in list(_COMPILED.items()):
            read = graph.assumptions
            named = {*classes, *read.classes.values(), *read.layers.values()}
            if len(_COMPILED) > _MOST_COMPILED or not all(map(_can_be_imported, named)):
                del _COMPILED[key]


def _can_be_imported(cls: type) -> bool:
    original = cls._bnrewrite_original if issubclass(cls, Converted) else cls
    found: Any = sys.modules.get(original.__module__)
    for name in original.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is original
