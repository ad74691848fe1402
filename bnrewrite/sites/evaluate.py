"""Which op evaluates a site of which mode, and with which options."""

import zlib
from typing import Any

from torch import Tensor

from bnrewrite.groups import place_in
from bnrewrite.modes import Mode, Shuffle, skips_nonfinite
from bnrewrite.ops.batch_norm import BATCH_NORM
from bnrewrite.ops.library import run_composite
from bnrewrite.ops.shuffle_batch_norm import SHUFFLE_BATCH_NORM


def site_number(name: str) -> int:
    """A number for the qualified name of a site, the same in every process and run."""
    return zlib.crc32(name.encode())


def shuffle_options(mode: Shuffle) -> tuple[str, str, str, int]:
    """Options of ``mode`` in the order in which the op ``shuffle_batch_norm`` takes them."""
    return mode.schedule, mode.backward, mode.running, mode.seed


def evaluate(mode: Mode, number: int, group: str, arguments: tuple[Any, ...]) -> Tensor:
    """Calls the op of ``mode``.

    Args:
        mode: of the site.
        number: of the site, from :func:`site_number`.
        group: a name from :func:`bnrewrite.groups.active_group`.
        arguments: those of the op ``batch_norm`` but for the group.
    """
    if isinstance(mode, Shuffle):
        return SHUFFLE_BATCH_NORM(
            *arguments, group, place_in(group), number, *shuffle_options(mode)
        )
    return run_composite(BATCH_NORM, *arguments, group, skips_nonfinite(mode))
