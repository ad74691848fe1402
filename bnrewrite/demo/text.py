"""The text: what the demo says on the terminal, in eighty columns."""

import dataclasses
from typing import Any

from torch import Tensor

from bnrewrite.demo.progress import TITLE_WIDTH
from bnrewrite.demo.runs import Run
from bnrewrite.demo.training import Outcome


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far two runs are from each other.

    Attributes:
        batch_loss: largest absolute difference of the loss of a batch, over all steps.
        state: largest difference of a parameter or running statistic at the end, relative to the
            largest value of its tensor where that is above one.
    """

    batch_loss: float
    state: float


def distance(one: Outcome, other: Outcome) -> Distance:
    """The distance between two runs of the same network."""
    return Distance(
        batch_loss=(one.batch_losses - other.batch_losses).abs().max().item(),
        state=max(
            _relative(value, other.state[name])
            for name, value in one.state.items()
            if value.is_floating_point()
        ),
    )


def _relative(value: Tensor, other: Tensor) -> float:
    scale = other.abs().max().clamp_min(1)
    return ((value - other).abs().max() / scale).item()


def table(runs: list[Run], outcomes: dict[str, Outcome]) -> str:
    """Loss and accuracy of each run on the training and test images, in evaluation mode."""
    pad = " " * TITLE_WIDTH
    lines = [
        f"{pad} {'train':^17}  {'test':^17}".rstrip(),
        f"{pad} {'loss':>7}  {'accuracy':>8}  {'loss':>7}  {'accuracy':>8}  {'seconds':>8}",
        "-" * (TITLE_WIDTH + 47),
    ]
    for run in runs:
        outcome = outcomes[run.key]
        train, test = outcome.train[-1], outcome.test[-1]
        lines.append(
            f"{run.title:{TITLE_WIDTH}} {train.loss:7.4f}  {train.accuracy:8.1%}  "
            f"{test.loss:7.4f}  {test.accuracy:8.1%}  {outcome.seconds:8.1f}"
        )
    return "\n".join(lines)


def comparisons(runs: list[Run], outcomes: dict[str, Outcome], other: str) -> str:
    """How far the converted runs are from run ``other``, which they must equal."""
    titles = {run.key: run.title for run in runs}
    num_steps = len(outcomes[other].batch_losses)
    width = TITLE_WIDTH + 23
    title = f"largest difference from {titles[other]}"
    lines = [f"{title:{width}}{'batch loss':>12}{'weights':>12}"]
    for run in runs:
        if run.key != other:
            far = distance(outcomes[run.key], outcomes[other])
            lines.append(f"{run.title:{width}}{far.batch_loss:12.1e}{far.state:12.1e}")
    lines.insert(1, "-" * len(lines[0]))
    lines.append(
        f"(float64; any of the {num_steps} batches; weights and running statistics at the end)"
    )
    return "\n".join(lines)


def summary(runs: list[Run], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """The numbers of all runs as plain values for a JSON file."""
    return {
        run.key: {
            "title": run.title,
            "epochs": outcomes[run.key].epochs,
            "train": [dataclasses.asdict(score) for score in outcomes[run.key].train],
            "test": [dataclasses.asdict(score) for score in outcomes[run.key].test],
            "batch_losses": outcomes[run.key].batch_losses.tolist(),
            "seconds": outcomes[run.key].seconds,
        }
        for run in runs
    }
