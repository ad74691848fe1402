"""What the demo compares: the settings, the runs, and which of them must agree."""

import dataclasses

BATCH_PER_RANK = 1
"""Images per rank and step: so few that statistics over them alone say little about the data."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        mode: the bnrewrite mode of the converted runs.
        world_size: number of ranks.
        epochs: passes over the training images.
        seed: of the weights, the split and the data order.
    """

    mode: str = "sync"
    world_size: int = 2
    epochs: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        key: short name, by which results are stored.
        title: what it is called in the table and the picture.
        distributed: whether it runs on all ranks, else in one process on the global batch.
        mode: bnrewrite mode, or None for the BatchNorm of torch.
        frozen: whether torch's BatchNorm layers stay in evaluation mode.
        compiled: whether ``torch.compile`` wraps the model.
    """

    key: str
    title: str
    distributed: bool
    mode: str | None = None
    frozen: bool = False
    compiled: bool = False


_EQUAL_TO = {"sync": "single", "local": "local", "frozen": "single"}

MODES = tuple(_EQUAL_TO)
"""The modes that have a run of plain torch to agree with."""


def planned_runs(settings: Settings) -> list[Run]:
    """The four runs in the order in which they are made and shown."""
    ranks = "1 rank" if settings.world_size == 1 else f"{settings.world_size} ranks"
    frozen = settings.mode == "frozen"
    norm = "frozen BatchNorm" if frozen else "BatchNorm"
    mode = settings.mode
    return [
        Run("single", f"one process, {norm}", distributed=False, frozen=frozen),
        Run("local", f"{ranks}, {norm}", distributed=True, frozen=frozen),
        Run("converted", f"{ranks}, bnrewrite {mode}", distributed=True, mode=mode),
        Run("compiled", f"{ranks}, {mode} compiled", distributed=True, mode=mode, compiled=True),
    ]


def equal_run(mode: str) -> str:
    """Key of the run of plain torch with which the converted run of ``mode`` must agree."""
    return _EQUAL_TO[mode]
