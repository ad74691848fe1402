"""``report``: what a conversion rewrote, what it left and why, and what a step communicates."""

import dataclasses
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnrewrite.capture.owner import communication_of, is_owner, owner_state
from bnrewrite.convert import Conversion, conversion_of
from bnrewrite.groups import world_size
from bnrewrite.passes.base import PassReport, Rewrite, Skip
from bnrewrite.passes.replace_batch_norm import replace_batch_norm
from bnrewrite.sites.floor import is_site, site_state


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One BatchNorm evaluation.

    Attributes:
        name: qualified name.
        mode: name of its mode.
        group: name of its process group, ``"default"`` for the default one, "" if it has none.
        num_channels: number of channels, where known.
        owner: qualified name of the module whose graph contains it ("" is the model itself); None
            if the BatchNorm module evaluates it by itself.
        where: file and line of the call, where known.
    """

    name: str
    mode: str
    group: str
    num_channels: int | None
    owner: str | None
    where: str | None


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
        num_owners: modules that run a captured graph.
        num_owners_train_eval: of these, how many need different graphs in training and evaluation.
        collectives_forward: collectives of a training forward, with more than one rank.
        collectives_backward: collectives of a backward, with more than one rank.
        num_communicating: evaluations of a training step that take part in them.
        world_size: ranks of the default process group now; 1 without one.
    """

    model: str
    sites: tuple[SiteReport, ...]
    passes: tuple[PassSummary, ...]
    skipped: tuple[Skip, ...]
    num_owners: int
    num_owners_train_eval: int
    collectives_forward: int
    collectives_backward: int
    num_communicating: int
    world_size: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists and strings, ready for ``json.dumps``."""
        return dataclasses.asdict(self)

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
            f"{self.num_owners} modules run captured graphs, {self.num_owners_train_eval} of them "
            "have one for training and one for evaluation"
        )
        lines.append(
            f"collectives per step: {self.collectives_forward} forward + "
            f"{self.collectives_backward} backward"
            + f" for {self.num_communicating} evaluations"
            + ("" if self.world_size > 1 else " (none with a single rank)")
        )
        for skip in self.skipped:
            place = f" ({skip.where})" if skip.where else ""
            lines.append(f"left: {skip.name}: {skip.reason}{place}")
        return "\n".join(line.rstrip() for line in lines)


def report(model: nn.Module) -> Report:
    """What :func:`bnrewrite.convert` did to ``model``.

    Args:
        model: a module that ``convert`` returned.

    Returns:
        A :class:`Report`; printing it gives the text form.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is not converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {type(model).__name__}.")
    conversion = conversion_of(model)
    if conversion is None:
        raise ValueError(
            f"{type(model).__name__} is not converted. Call bnrewrite.convert(model) first, and "
            "report on the model that it returned, not on a wrapper or a part of it."
        )
    rewritten: dict[str, Rewrite] = {}
    for one in _found(conversion, replace_batch_norm.__name__).rewritten:
        rewritten.setdefault(one.name, one)
    sites = [
        _module_site(module, rewritten.pop(site_state(module).name, None))
        for module in model.modules()
        if is_site(module)
    ]
    sites += [
        SiteReport(
            name=one.name,
            mode=one.mode.name,
            group=conversion.group if one.mode.communicates else "",
            num_channels=None,
            owner=one.owner,
            where=one.where,
        )
        for one in rewritten.values()
        if one.mode is not None
    ]
    states = [owner_state(module) for module in model.modules() if is_owner(module)]
    communication = communication_of(model)
    return Report(
        model=type(model).__name__,
        sites=tuple(sites),
        passes=tuple(_summary(name, done) for name, done in conversion.reports.items()),
        skipped=tuple(conversion.skipped),
        num_owners=sum(state is not None for state in states),
        num_owners_train_eval=sum(state is not None and state.differs for state in states),
        collectives_forward=communication.forward,
        collectives_backward=communication.backward,
        num_communicating=communication.evaluations,
        world_size=world_size(),
    )


def _summary(name: str, done: PassReport) -> PassSummary:
    """What a pass did; what it left in one graph and rewrote in a larger one is not left."""
    rewritten = {one.name for one in done.rewritten}
    left = {skip.name: skip for skip in done.skipped if skip.name not in rewritten}
    return PassSummary(name, len(rewritten), tuple(left.values()))


def _found(conversion: Conversion, name: str) -> PassReport:
    return conversion.reports.get(name, PassReport())


def _module_site(module: nn.Module, rewrite: Rewrite | None) -> SiteReport:
    state = site_state(module)
    return SiteReport(
        name=state.name,
        mode=state.mode.name,
        group=state.group,
        num_channels=module.num_features if isinstance(module, _BatchNorm) else None,
        owner=None if rewrite is None else rewrite.owner,
        where=None if rewrite is None else rewrite.where,
    )
