"""The conversions that a module holds, as one: with names from that module on."""

import dataclasses
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnrewrite.capture.owner import owner_state
from bnrewrite.conversion import Conversion, conversion_of
from bnrewrite.naming import ITSELF
from bnrewrite.passes.base import PassReport, Rewrite, Skip, joined
from bnrewrite.sites.floor import is_site, site_state


@dataclasses.dataclass(frozen=True)
class Roots:
    """The modules below one that were converted as a whole, wrappers and parts included.

    Attributes:
        prefixes: of names, for each module: the path of the innermost root that holds it.
        conversions: what is noted of each root, by its path, with names from the model on and
            without what was converted anew since.
        outside: paths of the BatchNorm modules that are not converted.
    """

    prefixes: dict[nn.Module, str]
    conversions: dict[str, Conversion]
    outside: tuple[Skip, ...]

    def name_of(self, site: nn.Module) -> str:
        """Qualified name of a converted BatchNorm module."""
        return joined(self.prefixes.get(site, ""), site_state(site).name)

    def name_of_owner(self, owner: nn.Module) -> str:
        """Qualified name of a module with a graph; "" is the model itself."""
        state = owner_state(owner)
        return joined(self.prefixes.get(owner, ""), "" if state is None else state.recipe.name)

    def reports(self) -> dict[str, PassReport]:
        """What each pass did, over all of them."""
        total: dict[str, PassReport] = {}
        for conversion in self.conversions.values():
            for name, one in conversion.reports.items():
                total.setdefault(name, PassReport()).add(one)
        return total


def roots_of(model: nn.Module) -> Roots:
    """The conversions that ``model`` and the modules below it hold."""
    modules = dict(model.named_modules())
    found = {
        path: conversion
        for path, module in modules.items()
        if (conversion := conversion_of(module)) is not None
    }
    prefixes = {
        module: root for path, module in modules.items() if (root := _root(path, found)) is not None
    }
    conversions = {path: _named(path, found) for path in found}
    roots = Roots(prefixes, conversions, ())
    return dataclasses.replace(roots, outside=tuple(_outside(modules, roots)))


def _root(path: str, found: dict[str, Conversion]) -> str | None:
    """Path of the innermost root at or above ``path``."""
    while path not in found:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def _named(root: str, found: dict[str, Conversion]) -> Conversion:
    """What is noted of the root, with names from the model on."""

    def named(one: Skip) -> Skip:
        name = (root or ITSELF) if one.name == ITSELF else joined(root, one.name)
        owner = None if one.owner is None else joined(root, one.owner)
        return dataclasses.replace(one, name=name, owner=owner)

    def rewrite(one: Rewrite) -> Rewrite:
        return dataclasses.replace(one, name=joined(root, one.name), owner=joined(root, one.owner))

    def is_own(one: Skip | Rewrite) -> bool:
        return _root("" if one.name == ITSELF else one.name, found) == root

    conversion = found[root]
    reports = {
        name: PassReport(
            list(filter(is_own, map(rewrite, report.rewritten))),
            list(filter(is_own, map(named, report.skipped))),
        )
        for name, report in conversion.reports.items()
    }
    skipped = list(filter(is_own, map(named, conversion.skipped)))
    sites = tuple(joined(root, name) for name in conversion.sites)
    own = tuple(name for name in sites if _root(name, found) == root)
    return dataclasses.replace(conversion, reports=reports, skipped=skipped, sites=own)


def _outside(modules: dict[str, nn.Module], roots: Roots) -> Iterator[Skip]:
    """BatchNorm modules that are not converted, and sites that are not there any more."""
    known = {skip.name for one in roots.conversions.values() for skip in one.skipped}
    sites = {name for one in roots.conversions.values() for name in one.sites}
    present = {roots.name_of(module) for module in modules.values() if is_site(module)}
    for path, module in modules.items():
        if not isinstance(module, _BatchNorm) or is_site(module):
            continue
        present.add(path)
        if module not in roots.prefixes:
            yield Skip(path, "is not converted: it is outside the converted modules")
        elif path in sites:
            yield Skip(path, "is not converted: it was added after convert, or reverted since then")
        elif path not in known:
            yield Skip(path, "is not converted: it was added after convert")
    for name in sorted(sites - present):
        yield Skip(name, "was converted, but is no longer there")
