"""The passes, an ordinary list in the order in which they run.

``replace_batch_norm`` is what conversion means and always runs. Those after it only optimise:
results are the same with any subset of them.
"""

import logging

from bnrewrite.passes.base import OwnerGraph, Pass, PassReport
from bnrewrite.passes.replace_batch_norm import replace_batch_norm

log = logging.getLogger(__name__)

REQUIRED: tuple[Pass, ...] = (replace_batch_norm,)
OPTIMISING: tuple[Pass, ...] = ()


def optimising_names(names: object) -> tuple[str, ...]:
    """Checks what the user gave as ``passes``; None stands for all optimising passes.

    Raises:
        TypeError: it is not a sequence of names.
        ValueError: a name that no optimising pass has.
    """
    known = [one.__name__ for one in OPTIMISING]
    if names is None:
        return tuple(known)
    if isinstance(names, str) or not isinstance(names, (tuple, list, set, frozenset)):
        raise TypeError(
            f"passes must be a sequence of names of optimising passes, or None for all, but it is "
            f"{type(names).__name__} ({names!r})."
        )
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown optimising pass {name!r} in passes. "
                f"Known passes: {', '.join(known) or 'none yet, so use passes=()'}."
            )
    return tuple(name for name in known if name in names)


def run_passes(target: OwnerGraph, names: tuple[str, ...]) -> dict[str, PassReport]:
    """Runs the required passes and the named ones on one graph, in order."""
    reports: dict[str, PassReport] = {}
    for one in (*REQUIRED, *OPTIMISING):
        if one in OPTIMISING and one.__name__ not in names:
            continue
        report = reports[one.__name__] = PassReport()
        one(target, report)
        target.graph.lint()
        log.debug(
            "%s in %s (%s): %d rewritten, %d left",
            one.__name__,
            target.name or "the root",
            "train" if target.training else "eval",
            len(report.rewritten),
            len(report.skipped),
        )
    return reports
