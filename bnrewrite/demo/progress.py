"""Progress: a bar per run on a terminal, one line per run elsewhere."""

import sys
import time
from types import TracebackType

TITLE_WIDTH = 30


class Progress:
    """Shows how far a run is, as a context manager.

    Args:
        title: name of the run.
        total: number of steps.
        shown: False for all ranks but the first.
    """

    def __init__(self, title: str, total: int, *, shown: bool = True) -> None:
        from tqdm import tqdm

        self._title = title
        self._shown = shown
        self._started = time.perf_counter()
        self._loss = 0.0
        self._num_steps = 0
        self._bar = tqdm(
            total=total,
            desc=f"{title:{TITLE_WIDTH}}",
            bar_format="{desc} {bar:16} {n_fmt:>5}/{total_fmt}  {elapsed}{postfix}",
            mininterval=0.2,
            file=sys.stdout,
            disable=not (shown and sys.stdout.isatty()),
        )

    def step(self, loss: float) -> None:
        """Counts one step; the shown loss is an average over the last steps."""
        self._num_steps += 1
        weight = max(0.02, 1 / self._num_steps)
        self._loss += weight * (loss - self._loss)
        self._bar.set_postfix_str(f"loss {self._loss:.3f}", refresh=False)
        self._bar.update()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar.disable and self._shown and error is None:
            seconds = time.perf_counter() - self._started
            print(
                f"{self._title:{TITLE_WIDTH}} {self._num_steps:5} steps  {seconds:5.1f} s",
                flush=True,
            )
        self._bar.close()
