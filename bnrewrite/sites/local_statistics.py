"""Warnings of statistics that are one rank's, though the model was converted to share them."""

import os
import warnings
import weakref
from collections.abc import Callable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnrewrite.modes import ModeTable
from bnrewrite.naming import ITSELF


class LocalStatistics:
    """What normalizes each rank's batch alone beside the sites of a conversion; said once each.

    Attributes:
        model: gives the model that was converted, while it lives.
        modes: that it was converted with.
    """

    def __init__(self, model: Callable[[], nn.Module | None], modes: ModeTable) -> None:
        self.model = model
        self.modes = modes
        self._said: set[str] = set()

    def __deepcopy__(self, memo: dict) -> "LocalStatistics":
        # A copy of the whole model is in the memo before its parts are copied.
        copied = memo.get(id(self.model()))
        return LocalStatistics(weakref.ref(copied) if copied is not None else _unknown, self.modes)

    def __reduce__(self) -> tuple:
        # A part must not take the whole along.
        return (LocalStatistics, (_unknown, self.modes))

    def warn_of_added(self, is_member: Callable[[nn.Module], bool]) -> None:
        """Warns of BatchNorm layers that came after the conversion and train with the rest."""
        names = set(self._added(is_member)) - self._said
        if names:
            self._said |= names
            warnings.warn(
                f"{', '.join(sorted(names))}: put in after convert(), so torch's BatchNorm runs "
                "there and normalizes the batch of each rank alone. Call bnrewrite.convert(model) "
                "once more, with the same arguments, to include it.",
                stacklevel=2,
            )

    def _added(self, is_member: Callable[[nn.Module], bool]) -> Iterator[str]:
        model = self.model()
        for name, module in () if model is None else model.named_modules():
            if (
                isinstance(module, _BatchNorm)
                and not isinstance(module, nn.SyncBatchNorm)
                and module.training
                and not is_member(module)
            ):
                mode = self.modes.find(name)
                # What matches no pattern was left on purpose.
                if mode is not None and mode.communicates:
                    yield name or ITSELF

    def warn_without_group(self) -> None:
        """Warns where a launcher has started several ranks, but there is no process group."""
        num_ranks = os.environ.get("WORLD_SIZE", "")
        if num_ranks.isdecimal() and int(num_ranks) > 1 and "" not in self._said:
            self._said.add("")
            warnings.warn(
                f"WORLD_SIZE is {num_ranks}, but torch.distributed is not initialized, so each "
                "rank normalizes its batch alone. Call torch.distributed.init_process_group() "
                "before training.",
                stacklevel=2,
            )


def _unknown() -> None:
    """Stands for a model that nobody can find any more."""
