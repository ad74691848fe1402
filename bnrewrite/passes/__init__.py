"""The passes, an ordinary list in the order in which they run.

``replace_batch_norm`` does the conversion and always runs. The passes after it only optimize: any
subset of them gives the same results.
"""

import logging
import time

from bnrewrite.naming import ITSELF
from bnrewrite.passes.base import OwnerGraph, Pass, PassReport
from bnrewrite.passes.fuse_epilogue import fuse_epilogue
from bnrewrite.passes.inline_children import inline_children
from bnrewrite.passes.overlap_backward import overlap_backward
from bnrewrite.passes.overlap_collectives import overlap_collectives
from bnrewrite.passes.replace_batch_norm import replace_batch_norm
from bnrewrite.passes.share_collectives import share_collectives
from bnrewrite.settings import disabled_passes, dump_directory

log = logging.getLogger(__name__)

REQUIRED: tuple[Pass, ...] = (replace_batch_norm,)
OPTIMIZING: tuple[Pass, ...] = (
    inline_children,
    share_collectives,
    overlap_collectives,
    fuse_epilogue,
    overlap_backward,
)


def optimizing_names(names: object) -> tuple[str, ...]:
    """Names of the optimizing passes to run, in order, from the ``passes`` argument of ``convert``.

    None stands for all of them. Passes in BNREWRITE_DISABLE are left out in any case.

    Raises:
        TypeError: it is not a sequence of names.
        ValueError: a name is not that of an optimizing pass.
    """
    known = tuple(one.__name__ for one in OPTIMIZING)
    disabled = disabled_passes(known)
    if names is None:
        names = known
    if isinstance(names, str) or not isinstance(names, (tuple, list, set, frozenset)):
        raise TypeError(
            f"passes must be a sequence of names of optimizing passes, or None for all, but it is "
            f"{type(names).__name__} ({names!r})."
        )
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown optimizing pass {name!r} in passes. Known passes: {', '.join(known)}."
            )
    return tuple(name for name in known if name in names and name not in disabled)


def run_required(target: OwnerGraph) -> dict[str, PassReport]:
    """Runs what conversion means on one graph."""
    _dump(target, 0, "captured")
    return _run(target, REQUIRED, 1)


def run_optimizing(target: OwnerGraph, names: tuple[str, ...]) -> dict[str, PassReport]:
    """Runs the named passes on one graph, in order, after the required ones."""
    passes = tuple(one for one in OPTIMIZING if one.__name__ in names)
    return _run(target, passes, 1 + len(REQUIRED))


def _run(target: OwnerGraph, passes: tuple[Pass, ...], index: int) -> dict[str, PassReport]:
    reports: dict[str, PassReport] = {}
    for one in passes:
        name = one.__name__
        start = time.perf_counter()
        report = reports[name] = PassReport()
        one(target, report)
        log.debug(
            "%s in %s (%s): %d rewritten, %d left, %.1f ms",
            name,
            target.name or ITSELF,
            "train" if target.training else "eval",
            len(report.rewritten),
            len(report.skipped),
            1e3 * (time.perf_counter() - start),
        )
        _dump(target, index, name)
        index += 1
    return reports


def _dump(target: OwnerGraph, index: int, name: str) -> None:
    directory = dump_directory()
    if directory is None:
        return
    folder = directory / (target.name or "model") / ("train" if target.training else "eval")
    folder.mkdir(parents=True, exist_ok=True)
    code = target.graph.python_code("self", verbose=True).src
    (folder / f"{index:02}_{name}.py").write_text(code, encoding="utf-8")
