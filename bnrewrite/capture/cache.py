"""What comes of capturing a module, and finding it again for modules of the same structure."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from bnrewrite.capture.assumptions import Assumptions
from bnrewrite.capture.candidates import mentions_batch_norm
from bnrewrite.capture.captured import Captured
from bnrewrite.capture.forms import Form
from bnrewrite.modes import Mode, ModeTable
from bnrewrite.passes.base import PassReport, joined
from bnrewrite.passes.replace_batch_norm import functional_name
from bnrewrite.sites.classes import below, original_class
from bnrewrite.sites.floor import has_hooks, is_site, site_state


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an owner was captured, in plain values, so that a loaded model can be captured again.

    Attributes:
        name: qualified name of the owner.
        modes: which mode each site gets.
        group: name of the process group of communicating sites.
        keep: patterns of modules that must stay callable units.
        passes: names of the optimizing passes to run.
        untraced: names of modules with sites that could not be traced by themselves.
        forms: other ways to call it that are known.
    """

    name: str
    modes: ModeTable
    group: str
    keep: tuple[str, ...]
    passes: tuple[str, ...]
    untraced: tuple[str, ...] = ()
    forms: tuple[Form, ...] = ()


@dataclasses.dataclass(frozen=True)
class Capture:
    """Outcome of capturing one module.

    Attributes:
        train: the graph for training; None if the module could not be captured or owns no site.
        eval: the graph for evaluation, the same object if one serves both.
        reports: what each pass did in the training graph, by pass name.
        refused: why the module could not be captured.
        assumptions: what the trace had read, if there is no graph.
        calls: paths of children that it calls with optional arguments, and the forms.
        plain: the training graph before the optimizing passes, where there is one.
        only_asks: whether all that the graphs are good for is to answer what the forward asks of
            the classes of modules.
        unanswered: why there are no graphs for that, where there would be none for anything else.
        recipe: with which the module becomes an owner, if it has to answer.
    """

    train: Captured | None
    eval: Captured | None
    reports: dict[str, PassReport]
    refused: str | None = None
    assumptions: Assumptions | None = None
    calls: tuple[tuple[str, Form], ...] = ()
    plain: Captured | None = None
    only_asks: bool = False
    unanswered: str | None = None
    recipe: Recipe | None = None

    @property
    def _read(self) -> list[Assumptions]:
        """What the traces had read."""
        graphs = [one for one in (self.eval, self.train) if one is not None]
        read = [form.assumptions for one in graphs for form in one.forms]
        return read if self.assumptions is None else [*read, self.assumptions]

    @property
    def asked(self) -> dict[str, str]:
        """Modules whose classes the forward may compare, by path, with file and line."""
        return {path: place for one in self._read for path, place in one.asked.items()}

    def serves(self, module: nn.Module) -> bool:
        """Whether capturing ``module``, of the same structure, would come out the same."""
        read = self._read
        return bool(read) and all(one.hold_for_another(module) for one in read)


class Cache:
    """Captures of a conversion: blocks of a network share their graphs.

    All are made with the same recipe but for the name.
    """

    def __init__(self) -> None:
        self._captures: dict[Any, list[Capture]] = defaultdict(list)
        self._plain: dict[Any, list[Captured]] = defaultdict(list)
        self._plain_of: dict[nn.Module, Captured | None] = {}

    def capture(
        self, module: nn.Module, recipe: Recipe, make: Callable[[nn.Module, Recipe], Capture]
    ) -> Capture:
        """An earlier capture if it serves ``module``, else what ``make`` makes."""
        captures = self._captures[_structure(module, recipe)]
        for earlier in captures:
            if earlier.serves(module):
                found = _renamed(earlier, module, recipe)
                break
        else:
            found = make(module, recipe)
            captures.append(found)
        self._plain_of[module] = found.plain
        return found

    def plain(
        self,
        module: nn.Module,
        recipe: Recipe,
        make: Callable[[nn.Module, Recipe], Captured | None],
    ) -> Captured | None:
        """The plain training graph of ``module``, of its capture or one that ``make`` makes.

        None if it was captured and has none.
        """
        if module not in self._plain_of:
            graphs = self._plain[_structure(module, recipe)]
            for earlier in graphs:
                if earlier.assumptions.hold_for_another(module):
                    found = earlier
                    break
            else:
                found = make(module, recipe)
                if found is not None:
                    graphs.append(found)
            self._plain_of[module] = found
        return self._plain_of[module]


def _structure(module: nn.Module, recipe: Recipe) -> Any:
    """What must be equal for two modules to share a graph, besides what their traces read."""
    first: dict[int, int] = {}
    inside: list[tuple] = []
    sites: list[tuple] = []
    marked: list[tuple[str, bool]] = []
    functional: list[tuple] = []
    differ = recipe.modes.entries[0][0] != "*"
    watched = bool(recipe.untraced or recipe.keep)
    for path, child in module.named_modules(remove_duplicate=False):
        number = first.setdefault(id(child), len(first))
        inside.append((path, original_class(child), number, has_hooks(child)))
        if is_site(child):
            state = site_state(child)
            running = first.setdefault(id(child.running_mean), len(first))
            sites.append((path, state.mode, state.group, running))
        elif differ and (child is module or mentions_batch_norm(child)):
            # Its calls are part of the graph where it is traced through.
            functional.append((path, functional_modes(joined(recipe.name, path), recipe.modes)))
        name = joined(recipe.name, path) if watched else ""
        if watched and (
            name in recipe.untraced or any(fnmatchcase(name, pattern) for pattern in recipe.keep)
        ):
            marked.append((path, name in recipe.untraced))
    return tuple(inside), tuple(sites), tuple(functional), tuple(marked), recipe.forms


def functional_modes(owner: str, modes: ModeTable) -> tuple[Mode | None, ...]:
    """Modes of the functional sites that the module of this name may have."""
    names = (functional_name(owner, index) for index in range(_FUNCTIONAL))
    return tuple(map(modes.find, names))


_FUNCTIONAL = 8
"""Functional sites of one owner whose modes are compared; modules with more are rare, and patterns
that tell the ninth from the eighth rarer."""


def _renamed(earlier: Capture, module: nn.Module, recipe: Recipe) -> Capture:
    def name_of(name: str, path: str | None, owner: str) -> str:
        if path is not None:
            child = below(module, path)
            return site_state(child).name if is_site(child) else joined(recipe.name, path)
        if is_site(module):
            return site_state(module).name
        return joined(recipe.name, name.removeprefix(f"{owner}."))

    reports = {
        name: report.renamed(recipe.name, name_of) for name, report in earlier.reports.items()
    }
    return dataclasses.replace(earlier, reports=reports)
