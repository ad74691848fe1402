"""Errors of graphs with the names of the sites that they are about."""

from collections.abc import Sequence

from torch import nn

from bnrewrite.capture.captured import Captured
from bnrewrite.errors import UnsupportedBatchNorm
from bnrewrite.naming import holds, keeps_none
from bnrewrite.sites.classes import below
from bnrewrite.sites.floor import is_site, site_state


def named_error(
    error: UnsupportedBatchNorm, owner: nn.Module, captured: Captured, functional: Sequence[str]
) -> UnsupportedBatchNorm:
    """The error with the name of the site whose parameters the failed op was given.

    Without such, every site of the graph may be it that keeps none where they can be found.

    Args:
        error: of the op.
        owner: whose graph has run.
        captured: the graph.
        functional: names of its calls of ``F.batch_norm``.
    """
    if not error.tensors:
        # It has a name already.
        return error
    if is_site(owner):
        return site_state(owner).named(error)
    sites = {path: below(owner, path) for path in captured.sites}
    for site in sites.values():
        if holds(site, error.tensors):
            return site_state(site).named(error)
    names = [
        *(site_state(site).name for site in sites.values() if keeps_none(site)),
        *functional,
    ]
    said = f"{'one of ' if len(names) > 1 else ''}{', '.join(names)}"
    return UnsupportedBatchNorm(f"{said}: {error}") if names else error
