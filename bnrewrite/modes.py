"""Modes: which values a site computes its statistics from."""

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal


def _check_flag(mode: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"{mode}: skip_nonfinite must be True or False, but it is {type(value).__name__} "
            f"({value!r})."
        )


@dataclasses.dataclass(frozen=True)
class Sync:
    """Statistics over all ranks of the process group, as in ``torch.nn.SyncBatchNorm``.

    Attributes:
        skip_nonfinite: if a batch contains NaN or infinity on any rank, leave the site's running
            statistics and ``num_batches_tracked`` unchanged on all ranks. Meant for training with
            ``GradScaler``, which skips such steps.

    Raises:
        TypeError: an option has the wrong type.
    """

    skip_nonfinite: bool = False

    name = "sync"
    communicates = True
    communicates_backward = True

    def __post_init__(self) -> None:
        _check_flag("Sync", self.skip_nonfinite)


@dataclasses.dataclass(frozen=True)
class Local:
    """Statistics over each rank's own batch, as in ``torch.nn.BatchNorm2d``.

    Attributes:
        skip_nonfinite: as in :class:`Sync`, but each rank looks only at its own batch.

    Raises:
        TypeError: an option has the wrong type.
    """

    skip_nonfinite: bool = False

    name = "local"
    communicates = False
    communicates_backward = False

    def __post_init__(self) -> None:
        _check_flag("Local", self.skip_nonfinite)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Running statistics in training and evaluation, never updated, as in FrozenBatchNorm2d."""

    name = "frozen"
    communicates = False
    communicates_backward = False


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """Statistics of another rank of the process group: ShuffleBatchNorm.

    A rank does not normalize with the statistics of its own batch, so contrastive training cannot
    infer from them which samples shared a batch (He et al. 2019, section 3.3,
    https://arxiv.org/abs/1911.05722). The exception: a rank whose peer holds an empty batch uses
    its own statistics.

    Attributes:
        schedule: ``"ring"``: rank r always uses the statistics of rank (r + 1) % W.
            ``"random"``: every site and step uses a new permutation without fixed points.
        backward: ``"exact"``: the true gradient. ``"detach"``: borrowed statistics are constants,
            and the backward pass communicates nothing.
        running: which statistics update the running statistics. ``"peer"``: those that the rank
            normalized with, so buffers differ between ranks. ``"group"``: those of the whole
            group, the same on all ranks.
        seed: seed of the random schedule, from 0 to 2^63 - 1.

    Raises:
        ValueError: an option has an unknown value.
        TypeError: the seed is not an integer.
    """

    schedule: Literal["ring", "random"] = "ring"
    backward: Literal["exact", "detach"] = "exact"
    running: Literal["peer", "group"] = "peer"
    seed: int = 0

    name = "shuffle"
    communicates = True

    @property
    def communicates_backward(self) -> bool:
        """Whether the backward pass needs a collective."""
        return self.backward == "exact"

    def __post_init__(self) -> None:
        for option, known in _SHUFFLE_OPTIONS.items():
            value = getattr(self, option)
            if value not in known:
                raise ValueError(
                    f"Shuffle: {option} must be {' or '.join(map(repr, known))}, "
                    f"but it is {value!r}."
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(
                f"Shuffle: seed must be an integer, but it is {type(self.seed).__name__} "
                f"({self.seed!r})."
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"Shuffle: seed must be from 0 to 2**63 - 1, but it is {self.seed}.")


_SHUFFLE_OPTIONS = {
    "schedule": ("ring", "random"),
    "backward": ("exact", "detach"),
    "running": ("peer", "group"),
}

Mode = Sync | Shuffle | Local | Frozen

MODES: dict[str, Mode] = {mode.name: mode for mode in (Sync(), Shuffle(), Local(), Frozen())}


def _parse(mode: object) -> Mode:
    if isinstance(mode, Mode):
        return mode
    if isinstance(mode, str):
        if mode in MODES:
            return MODES[mode]
        raise ValueError(f"unknown mode {mode!r}. Known modes: {', '.join(map(repr, MODES))}.")
    raise TypeError(
        f"mode must be a name, a mode object, or a mapping from patterns of site names to either, "
        f"but it is {type(mode).__name__} ({mode!r})."
    )


def skips_nonfinite(mode: Mode) -> bool:
    """Whether sites of ``mode`` keep batches with NaN or infinity out of running statistics."""
    return isinstance(mode, (Sync, Local)) and mode.skip_nonfinite


@dataclasses.dataclass(frozen=True)
class ModeTable:
    """The mode of each site: patterns of qualified names, where the first match wins."""

    entries: tuple[tuple[str, Mode], ...]

    @classmethod
    def parse(cls, mode: object) -> "ModeTable":
        """Parses the ``mode`` argument of ``convert``.

        Raises:
            TypeError: it is neither a mode nor a mapping to modes.
            ValueError: a name is unknown, or the mapping is empty.
        """
        if not isinstance(mode, Mapping):
            return cls((("*", _parse(mode)),))
        if not mode:
            raise ValueError(
                "mode is an empty mapping, so no site would be converted. "
                "Give at least one pattern, e.g. {'*': 'sync'}."
            )
        for pattern in mode:
            if not isinstance(pattern, str):
                raise TypeError(
                    "the patterns in mode must be strings, but one is "
                    f"{type(pattern).__name__} ({pattern!r})."
                )
        return cls(tuple((pattern, _parse(value)) for pattern, value in mode.items()))

    def find(self, site: str) -> Mode | None:
        """The mode of the first pattern that matches the qualified name ``site``, or None."""
        for pattern, mode in self.entries:
            if fnmatchcase(site, pattern):
                return mode
        return None

    @property
    def communicate(self) -> bool:
        """Whether any mode does in training."""
        return any(mode.communicates for _, mode in self.entries)

    def check_patterns(self, sites: list[str]) -> None:
        """Refuses patterns that match no site, or only such as have another mode by then.

        A lone mode (pattern ``*``) may match nothing, because there may be nothing to convert.

        Raises:
            ValueError: a pattern says nothing; the message lists some sites that exist, or names
                the pattern before.
        """
        for pattern, mode in self.entries:
            matched = [site for site in sites if fnmatchcase(site, pattern)]
            if not matched and pattern != "*":
                known = ", ".join(sites[:5]) + (", ..." if len(sites) > 5 else "")
                raise ValueError(
                    f"the pattern {pattern!r} in mode matches none of the {len(sites)} BatchNorm "
                    f"sites ({known or 'the model has none'}). Correct the pattern or remove it."
                )
            if matched and all(self.find(site) != mode for site in matched):
                before = next(one for one, _ in self.entries if fnmatchcase(matched[0], one))
                raise ValueError(
                    f"the pattern {pattern!r} in mode has no effect: the first pattern that "
                    f"matches a site wins, and {before!r} matches {matched[0]} before it. Put it "
                    f"in front of {before!r}, or remove it."
                )
