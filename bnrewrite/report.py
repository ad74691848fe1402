"""``report``: what a conversion rewrote, what it left and why, and what a step communicates."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnrewrite.groups import world_size
from bnrewrite.naming import ITSELF
from bnrewrite.passes.base import PassReport, Rewrite, Skip, joined
from bnrewrite.passes.effects import is_known_leaf
from bnrewrite.passes.replace_batch_norm import replace_batch_norm
from bnrewrite.roots import Roots, roots_of
from bnrewrite.sites.classes import below
from bnrewrite.sites.floor import is_site, site_state
from bnrewrite.steps import Round, left_because, rounds_of, running_state

BY_ITSELF = "own statistics"


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One BatchNorm evaluation.

    Attributes:
        name: qualified name.
        mode: name of its mode; ``"own statistics"`` if its forward computes its own statistics,
            which are not distributed.
        group: name of its process group; ``"default"`` for the default one, "" if it has none.
        num_channels: number of channels, if known.
        owner: qualified name of the module whose graph contains it ("" is the model itself); None
            if the BatchNorm module runs on its own, outside any graph.
        where: file and line of the call, if known.
        fused: what follows the site and was fused into its call, e.g. ``"sum, relu"``; "" if
            nothing was.
        shares_with: names of the other sites in its collective; includes its own name if it is
            evaluated there more than once.
    """

    name: str
    mode: str
    group: str
    num_channels: int | None
    owner: str | None
    where: str | None
    fused: str = ""
    shares_with: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class OwnerReport:
    """One module that runs a captured graph.

    Attributes:
        name: qualified name; "" is the model itself.
        differs: whether training and evaluation need separate graphs.
        inlined: qualified names of the modules whose forwards were inlined into its training graph
            so that their sites can share collectives.
    """

    name: str
    differs: bool
    inlined: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PassSummary:
    """What a pass did over all graphs."""

    name: str
    num_rewritten: int
    skipped: tuple[Skip, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        model: class name of the model.
        sites: every BatchNorm evaluation.
        passes: what each pass did.
        skipped: what was left as it was, with the reason.
        owners: modules that run a captured graph.
        rounds: what a training step evaluates, in order.
        collectives_forward: collectives per forward pass in training, with more than one rank.
        collectives_backward: collectives per backward pass, with more than one rank.
        before_forward: what ``collectives_forward`` would be with one collective per evaluation.
        before_backward: what ``collectives_backward`` would be with one per evaluation.
        num_communicating: number of evaluations in a training step that communicate.
        world_size: size of the default process group at the time of the report; 1 without one.
    """

    model: str
    sites: tuple[SiteReport, ...]
    passes: tuple[PassSummary, ...]
    skipped: tuple[Skip, ...]
    owners: tuple[OwnerReport, ...]
    rounds: tuple[Round, ...]
    collectives_forward: int
    collectives_backward: int
    before_forward: int
    before_backward: int
    num_communicating: int
    world_size: int

    @property
    def num_owners(self) -> int:
        """Number of modules that run a captured graph."""
        return len(self.owners)

    @property
    def num_owners_train_eval(self) -> int:
        """Number of these that need separate graphs for training and evaluation."""
        return sum(owner.differs for owner in self.owners)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists and strings, ready for ``json.dumps``."""
        return dataclasses.asdict(self) | {
            "num_owners": self.num_owners,
            "num_owners_train_eval": self.num_owners_train_eval,
        }

    def __str__(self) -> str:
        modes = ", ".join(sorted({site.mode for site in self.sites})) or "none"
        num_sites = f"{len(self.sites)} BatchNorm site{'' if len(self.sites) == 1 else 's'}"
        in_graph = sum(site.owner is not None for site in self.sites)
        lines = [
            f"{self.model}: {num_sites}, {in_graph} in captured graphs, "
            f"{len(self.sites) - in_graph} on their own    mode {modes}, "
            f"world size {self.world_size}",
            f"{'pass':24}{'rewritten':>10}{'left':>6}  why left",
        ]
        for one in self.passes:
            reasons = "; ".join(sorted({skip.reason for skip in one.skipped}))
            lines.append(f"{one.name:24}{one.num_rewritten:>10}{len(one.skipped):>6}  {reasons}")
        lines.append(
            f"{self.num_owners} modules run captured graphs; {self.num_owners_train_eval} of them "
            "use separate graphs for training and evaluation"
            if self.num_owners != 1
            else "1 module runs a captured graph"
            + ("; it uses separate graphs for training and evaluation" * self.num_owners_train_eval)
        )
        inlined = self.inlined()
        if inlined:
            lines.append(f"inlined to share collectives: {_few(inlined)}")
        lines.append(
            f"collectives per step: {self.collectives_forward} forward + "
            f"{self.collectives_backward} backward for {self.num_communicating} evaluations "
            f"({self.before_forward} + {self.before_backward} before sharing)"
            + ("" if self.world_size > 1 else "; none with one rank")
        )
        for skip in self.skipped:
            place = f" ({skip.where})" if skip.where else ""
            lines.append(f"left: {skip.name}: {skip.reason}{place}")
        return "\n".join(line.rstrip() for line in lines)

    def inlined(self) -> tuple[str, ...]:
        """Names of the modules that were inlined into graphs, without their submodules."""
        names = {name for owner in self.owners for name in owner.inlined}
        return tuple(
            name
            for owner in self.owners
            for name in owner.inlined
            if owner.name not in names and name.rpartition(".")[0] not in names
        )

    def table(self) -> str:
        """One line per site: mode, group, channels, what is fused, who shares, file and line."""
        rows = [("site", "mode", "group", "channels", "fused", "shares its collective with", "at")]
        for site in self.sites:
            channels = "" if site.num_channels is None else str(site.num_channels)
            where = short(site.where) or ("" if site.owner is not None else "on its own")
            shares = ", ".join(site.shares_with)
            rows.append((site.name, site.mode, site.group, channels, site.fused, shares, where))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


_FEW = 6


def short(where: str | None) -> str:
    """``where`` from the package on; "" if it is not known."""
    return "" if where is None else where.rpartition("site-packages/")[2]


def _few(names: tuple[str, ...]) -> str:
    """Some of many names."""
    rest = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {rest} more" if rest > 0 else "")


def report(model: nn.Module) -> Report:
    """Reports what :func:`bnrewrite.convert` did to ``model``.

    Args:
        model: a module that ``convert`` returned, or one that contains it, such as a wrapper.
            Names in the report are relative to ``model``.

    Returns:
        A :class:`Report`; print it for the text form.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is not converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {type(model).__name__}.")
    roots = roots_of(model)
    if not roots.conversions:
        raise ValueError(
            f"{type(model).__name__} is not converted. Call bnrewrite.convert(model) first, and "
            "pass the model that it returned, not a part of it."
        )
    rounds = tuple(rounds_of(model, roots))
    sites = _sites(model, roots, rounds)
    names = {site.name for site in sites}
    communicating = [one for one in rounds if one.collectives_forward]
    owners = {one.owner for one in rounds}
    return Report(
        model=type(model).__name__,
        sites=sites,
        passes=tuple(_summary(name, done, owners, names) for name, done in roots.reports().items()),
        skipped=(
            *(skip for one in roots.conversions.values() for skip in one.skipped),
            *roots.outside,
            *_left(model, roots),
        ),
        owners=tuple(_owners(model, roots)),
        rounds=rounds,
        collectives_forward=len(communicating),
        collectives_backward=sum(one.collectives_backward for one in communicating),
        before_forward=sum(len(one.sites) for one in communicating),
        before_backward=sum(len(one.sites) * one.collectives_backward for one in communicating),
        num_communicating=sum(len(one.sites) for one in communicating),
        world_size=world_size(),
    )


def _sites(model: nn.Module, roots: Roots, rounds: tuple[Round, ...]) -> tuple[SiteReport, ...]:
    """The sites, those of modules first, with what their first evaluation in a step is."""
    first: dict[str, Round] = {}
    for one in rounds:
        for name in one.sites:
            first.setdefault(name, one)
    rewritten: dict[str, Rewrite] = {}
    groups: dict[str, str] = {}
    for conversion in roots.conversions.values():
        for one in conversion.reports.get(replace_batch_norm.__name__, PassReport()).rewritten:
            rewritten.setdefault(one.name, one)
            groups[one.name] = conversion.group
    sites = [
        _module_site(module, name, rewritten.pop(name, None))
        for module in model.modules()
        if is_site(module)
        for name in (roots.name_of(module),)
    ]
    sites += [
        SiteReport(
            name=one.name,
            mode=one.mode.name,
            group=groups[one.name] if one.mode.communicates else "",
            num_channels=None,
            owner=one.owner,
            where=one.where,
        )
        for one in rewritten.values()
        # A module that is not there under its name is a part that was converted anew.
        if one.mode is not None and one.path is None
    ]
    return tuple(
        dataclasses.replace(
            site,
            owner=first[site.name].owner,
            fused=first[site.name].fused_with(site.name),
            shares_with=_others(first[site.name].sites, site.name),
        )
        if site.name in first
        else site
        for site in sites
    )


def _owners(model: nn.Module, roots: Roots) -> Iterator[OwnerReport]:
    for module in model.modules():
        state = running_state(module)
        if state is not None:
            name = roots.name_of_owner(module)
            # Activations that are fused are calls no longer, either, but no modules that one keeps.
            inlined = sorted(
                joined(name, path)
                for path in state.train.inlined
                if not is_known_leaf(below(module, path))
            )
            yield OwnerReport(name, state.differs, tuple(inlined))


def _left(model: nn.Module, roots: Roots) -> Iterator[Skip]:
    """Modules that run their own forwards, since their graphs stand for them no longer."""
    for module in model.modules():
        reason = left_because(module)
        # Without sites there is nothing that it shares no more.
        if reason is not None and any(map(is_site, module.modules())):
            name = roots.name_of_owner(module) or ITSELF
            yield Skip(name, f"runs its own forward since {reason}", owner=None)


def _summary(name: str, done: PassReport, owners: set[str | None], sites: set[str]) -> PassSummary:
    """What a pass did in the graphs that a step runs; inlined modules have others in reserve."""
    everywhere = name == replace_batch_norm.__name__
    rewritten = {
        one.name
        for one in done.rewritten
        if (one.name in sites if everywhere else one.owner in owners)
    }
    left = {
        skip.name: skip
        for skip in done.skipped
        if skip.name not in rewritten and (everywhere or skip.owner in {None, *owners})
    }
    return PassSummary(name, len(rewritten), tuple(left.values()))


def _others(names: tuple[str, ...], own: str) -> tuple[str, ...]:
    """``names`` once each, without one of ``own``."""
    others = list(names)
    others.remove(own)
    return tuple(dict.fromkeys(others))


def _module_site(module: nn.Module, name: str, rewrite: Rewrite | None) -> SiteReport:
    state = site_state(module)
    return SiteReport(
        name=name,
        mode=BY_ITSELF if state.by_itself else state.mode.name,
        group="" if state.by_itself else state.group,
        num_channels=module.num_features if isinstance(module, _BatchNorm) else None,
        owner=None if rewrite is None else rewrite.owner,
        where=None if rewrite is None else rewrite.where,
    )
