"""Which modules may own a site: found without running any of them."""

from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnrewrite.sites.classes import original_class
from bnrewrite.sites.floor import has_own_forward, is_site, site_state


def owner_candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of ``model`` by qualified name whose own forward may contain a site.

    These are the modules that hold a site directly or in a container, the BatchNorm modules with a
    forward of their own, and the other modules whose class mentions ``batch_norm``.
    """
    modules = dict(model.named_modules())
    found: set[str] = set()
    for name, module in modules.items():
        if is_site(module):
            if has_own_forward(module):
                found.add(name)
            if name:
                found.add(_holder(modules, name))
        elif not isinstance(module, _BatchNorm) and mentions_batch_norm(original_class(module)):
            # A BatchNorm module that is no site was left alone by the user's patterns.
            found.add(name)
    return {
        name: module for name, module in modules.items() if name in found and has_forward(module)
    }


def more_candidates(
    model: nn.Module, tried: dict[str, nn.Module], settled: set[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Holders of holders of the sites that are not in ``settled``, each one once, from below.

    Args:
        model: the model.
        tried: candidates that were captured already.
        settled: names of sites that need no further search.
    """
    modules = dict(model.named_modules())
    seen = set(tried)
    for name, module in modules.items():
        if not is_site(module) or has_own_forward(module) or site_state(module).name in settled:
            continue
        while name:
            name = _holder(modules, name)
            if name not in seen and has_forward(modules[name]):
                seen.add(name)
                yield name, modules[name]


def sharing_candidates(model: nn.Module, owners: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules of ``model`` by qualified name, no owners, that call children which communicate.

    Only these can have such children run side by side. Sequences run theirs one after the other.
    """
    communicating: set[str] = set()
    for name, module in model.named_modules():
        if is_site(module) and site_state(module).mode.communicates:
            while name:
                name = name.rpartition(".")[0]
                communicating.add(name)
    return {
        name: module
        for name, module in model.named_modules()
        if name in communicating
        and name not in owners
        and not is_site(module)
        and has_forward(module)
        and original_class(module).forward is not nn.Sequential.forward
    }


def has_forward(module: nn.Module) -> bool:
    """Whether the class of ``module`` defines a forward at all."""
    return original_class(module).forward is not nn.Module.forward


def _holder(modules: dict[str, nn.Module], name: str) -> str:
    """Name of the module that holds ``name``, past lists and dictionaries without a forward."""
    name = name.rpartition(".")[0]
    while name and not has_forward(modules[name]):
        name = name.rpartition(".")[0]
    return name


def mentions_batch_norm(cls: type[nn.Module]) -> bool:
    """Whether the forward of ``cls`` may call ``F.batch_norm``, directly or through helpers."""
    if cls not in _MENTIONS:
        _MENTIONS[cls] = not cls.__module__.startswith("torch.") and any(
            _reaches(function, 3, set())
            for base in cls.__mro__
            if not base.__module__.startswith("torch.")
            for function in vars(base).values()
            if isinstance(function, FunctionType)
        )
    return _MENTIONS[cls]


_MENTIONS: dict[type, bool] = {}


def _reaches(function: FunctionType, depth: int, seen: set[CodeType]) -> bool:
    """Whether the code of ``function``, or of the Python functions it names, says batch_norm."""
    code = function.__code__
    if code in seen:
        return False
    seen.add(code)
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(constant.co_names)
    if "batch_norm" in names:
        return True
    return depth > 0 and any(
        isinstance(helper, FunctionType)
        and not helper.__module__.startswith("torch.")
        and _reaches(helper, depth - 1, seen)
        for helper in map(function.__globals__.get, names)
    )
