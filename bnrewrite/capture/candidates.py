"""Which modules may own a site: found without running any of them."""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList

from bnrewrite.capture.values import routines
from bnrewrite.sites.classes import original_class
from bnrewrite.sites.floor import has_own_forward, is_site, site_state
from bnrewrite.sites.intercept import FUNCTIONS


def owner_candidates(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a model's ``modules`` by qualified name whose own forward may contain a site.

    These are the modules that hold a site directly or in a container, the BatchNorm modules with a
    forward of their own, and the other modules whose class mentions ``batch_norm``.
    """
    holders = Holders(modules)
    # What a parametrization is given is a weight.
    weights = {
        id(inside)
        for module in modules.values()
        if isinstance(module, ParametrizationList)
        for inside in module.modules()
    }
    found: set[str] = set()
    for name, module in modules.items():
        if is_site(module):
            if has_own_forward(module):
                found.add(name)
            found.update(holders.nearest(name))
        elif (
            # A BatchNorm module that is no site was left alone by the user's patterns.
            not isinstance(module, _BatchNorm)
            and id(module) not in weights
            and mentions_batch_norm(module)
        ):
            found.add(name)
    return {
        name: module for name, module in modules.items() if name in found and has_forward(module)
    }


def more_candidates(
    modules: dict[str, nn.Module], tried: dict[str, nn.Module], settled: set[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Holders of holders of the sites that are not in ``settled``, each one once.

    Args:
        modules: those of the model by qualified name.
        tried: candidates that were captured already.
        settled: names of sites that need no further search.
    """
    holders = Holders(modules)
    seen = set(tried)
    for name, module in modules.items():
        if not is_site(module) or has_own_forward(module) or site_state(module).name in settled:
            continue
        for above in holders.above([name]):
            if above not in seen and has_forward(modules[above]):
                seen.add(above)
                yield above, modules[above]


def sharing_candidates(
    modules: dict[str, nn.Module], owners: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Those of a model's ``modules``, no owners, that call children which communicate.

    Only these can have such children run side by side. Sequences run theirs one after the other.
    """
    communicating = Holders(modules).above(
        name
        for name, module in modules.items()
        if is_site(module) and site_state(module).mode.communicates
    )
    return {
        name: module
        for name, module in modules.items()
        if name in communicating
        and name not in owners
        and not is_site(module)
        and has_forward(module)
        and original_class(module).forward is not nn.Sequential.forward
    }


class Holders:
    """Which of a model's modules hold which: several hold a module that is registered twice.

    Args:
        modules: those of the model by qualified name.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        names = {id(module): name for name, module in modules.items()}
        self._of: dict[str, list[str]] = {name: [] for name in modules}
        for name, module in modules.items():
            # What a module says of itself may leave some out.
            for child in dict.fromkeys(map(id, module._modules.values())):
                if child in names:
                    self._of[names[child]].append(name)

    def nearest(self, name: str) -> list[str]:
        """Holders of the module ``name``, past lists and dictionaries without a forward."""
        left, found = [name], []
        for one in left:
            for holder in self._of[one]:
                if holder in left or holder in found:
                    continue
                (found if has_forward(self._modules[holder]) else left).append(holder)
        return found

    def above(self, names: Iterable[str]) -> dict[str, None]:
        """Names of the modules that hold modules of these names, however far up."""
        found: dict[str, None] = {}
        left = list(names)
        for name in left:
            for one in self._of[name]:
                if one not in found:
                    found[one] = None
                    left.append(one)
        return found


def children_first(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Those of a model by name, each once and behind all that it holds, the last ones first."""
    names = {id(module): name for name, module in modules.items()}

    def walk(one: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        name = names.pop(id(one), None)
        if name is None:
            return
        for child in reversed(one._modules.values()):
            if child is not None:
                yield from walk(child)
        yield name, one

    for module in modules.values():
        yield from walk(module)


def has_forward(module: nn.Module) -> bool:
    """Whether the class of ``module`` defines a forward at all."""
    return original_class(module).forward is not nn.Module.forward


def mentions_batch_norm(module: nn.Module) -> bool:
    """Whether the forward of ``module`` may call ``F.batch_norm``, directly or through helpers.

    Helpers are methods, functions of any module that its code names, and functions and graphs that
    the module holds as attributes.
    """
    cls = original_class(module)
    if cls not in _MENTIONS:
        _MENTIONS[cls] = any(_reaches(value, _DEPTH, {}) for value in _members(cls))
    return _MENTIONS[cls] or any(
        _reaches(value, _DEPTH, {})
        for value in module.__dict__.values()
        if isinstance(value, _CALLABLES)
    )


def computes_itself(module: nn.Module) -> bool:
    """Whether no code of a BatchNorm's own class names torch's forward or ``F.batch_norm``."""
    names = _names_of(module)
    return not mentions_batch_norm(module) and not any("forward" in one for one in names)


def mentions_checkpoint(module: nn.Module) -> bool:
    """Whether the code of the module's class names a checkpoint."""
    return any("checkpoint" in name for names in _names_of(module) for name in names)


def looks_above_itself(module: nn.Module) -> bool:
    """Whether code looks for what is above the class of an object: ``super(self.__class__, self)``.

    It finds itself, for ever, in a subclass, which conversion would make.
    """
    return any({"super", "__class__"} <= names for names in _names_of(module))


def _names_of(module: nn.Module) -> Iterator[frozenset[str]]:
    for value in _members(original_class(module)):
        for function in routines(value):
            yield code_names(function.__code__)


_MENTIONS: "weakref.WeakKeyDictionary[type, bool]" = weakref.WeakKeyDictionary()
_DEPTH = 3
"""How many calls from the module's own code helpers may be away."""

_CALLABLES = (FunctionType, BuiltinFunctionType, MethodType, functools.partial, fx.Graph)
"""What a module may hold that evaluates a BatchNorm."""


def _members(cls: type) -> Iterator[Any]:
    """What the classes of a user define."""
    for base in cls.__mro__:
        if not base.__module__.startswith(("torch.", "builtins")):
            yield from vars(base).values()


def _reaches(value: Any, depth: int, seen: dict[CodeType, int]) -> bool:
    """Whether ``value`` evaluates a BatchNorm, or code says so that it can reach in some calls."""
    if isinstance(value, functools.partial):
        return _reaches(value.func, depth, seen)
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        return _reaches(value.__func__, depth, seen)
    if isinstance(value, property):
        return _reaches(value.fget, depth, seen)
    if any(value is function for function in FUNCTIONS):
        return True
    if isinstance(value, fx.Graph):
        called = {node.target for node in value.nodes if node.op == "call_function"}
        return any(
            "batch_norm" in getattr(one, "__name__", "") or _reaches(one, depth, seen)
            for one in called
        )
    if not isinstance(value, FunctionType) or seen.get(value.__code__, -1) >= depth:
        return False
    if value.__module__ is not None and value.__module__.startswith("torch."):
        return False
    seen[value.__code__] = depth
    names = code_names(value.__code__)
    if any("batch_norm" in name and hasattr(torch, name) for name in names):
        return True
    return any(_reaches(helper, depth - 1, seen) for helper in helpers(value, names))


@functools.cache
def code_names(code: CodeType) -> frozenset[str]:
    """The names that code and the functions inside it use."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= code_names(constant)
    return frozenset(names)


def helpers(function: FunctionType, names: frozenset[str]) -> Iterator[Any]:
    """What the code of a function may call: what it closes over, and what its names stand for."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
    for value in map(function.__globals__.get, names):
        if isinstance(value, ModuleType):
            if not value.__name__.startswith("torch"):
                yield from (vars(value).get(name) for name in names)
        elif isinstance(value, type):
            if not issubclass(value, nn.Module):
                yield from _members(value)
        else:
            yield value
