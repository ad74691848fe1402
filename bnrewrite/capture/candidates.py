"""Which modules may own a site: found without running any of them."""

from types import CodeType, FunctionType

from torch import nn

from bnrewrite.sites.classes import original_class
from bnrewrite.sites.floor import has_own_forward, is_site

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def owner_candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of ``model``, with their qualified names, whose own forward may contain a site.

    These are the modules that hold a site directly or in a container, the BatchNorm modules with a
    forward of their own, and the modules whose class mentions ``batch_norm``.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if is_site(module):
            if has_own_forward(module):
                found[name] = module
            parent = name.rpartition(".")[0]
            while name and parent and isinstance(modules.get(parent), _CONTAINERS):
                parent = parent.rpartition(".")[0]
            if name and parent in modules:
                found[parent] = modules[parent]
        elif mentions_batch_norm(original_class(module)):
            found[name] = module
    return [(name, module) for name, module in modules.items() if name in found]


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
