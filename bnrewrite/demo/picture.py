"""The picture: loss and accuracy of the runs, and how far each is from the single process."""

from typing import Any

from bnrewrite.demo.runs import BATCH_PER_RANK, Run, Settings
from bnrewrite.demo.training import Outcome

_INK = "#1f2937"
_FAINT = "#9ca3af"
_ROUNDING = 1e-11
"""Below this the picture says "rounding": sums of a thousand values, through some layers."""
_STYLES: dict[str, dict[str, Any]] = {
    "single": {"color": "#c3cad6", "linewidth": 7, "solid_capstyle": "round", "zorder": 2},
    "local": {"color": "#e2582d", "linewidth": 2.2, "zorder": 3},
    "converted": {"color": "#1d63d8", "linewidth": 2.2, "zorder": 4},
    "compiled": {"color": "#0b1f44", "linewidth": 1.3, "linestyle": (0, (1.5, 2.5)), "zorder": 5},
}


def draw(runs: list[Run], outcomes: dict[str, Outcome], settings: Settings, path: str) -> None:
    """Writes the picture of all runs to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    look: dict[Any, Any] = {
        "font.size": 10.5,
        "text.color": _INK,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
    }
    with plt.rc_context(look):
        figure, (loss, accuracy, distance) = plt.subplots(1, 3, figsize=(13, 5), dpi=130)
        for run in runs:
            outcome = outcomes[run.key]
            style = _STYLES[run.key] | {"label": run.title}
            loss.plot(outcome.epochs, [score.loss for score in outcome.test], **style)
            values = [100 * score.accuracy for score in outcome.test]
            accuracy.plot(outcome.epochs, values, **style)
            if run.key != "single":
                _draw_distance(distance, outcome, outcomes["single"], settings, style)
        _finish(loss, "test loss", settings, log=True)
        loss.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        _finish(accuracy, "test accuracy, %", settings)
        accuracy.set_ylim(0, 102)
        _finish(distance, "batch loss: difference from one process", settings, log=True)
        distance.set_ylim(1e-17, 1e2)
        distance.axhspan(1e-17, _ROUNDING, color="#eef2f8", linewidth=0, zorder=0)
        distance.text(0.02 * settings.epochs, _ROUNDING / 12, "rounding", color="#6b7280")
        _write_titles(figure, loss, settings, len(outcomes["single"].batch_losses))
        figure.savefig(path, facecolor="white")
        plt.close(figure)


def _draw_distance(
    axes: Any, outcome: Outcome, single: Outcome, settings: Settings, style: dict[str, Any]
) -> None:
    difference = (outcome.batch_losses - single.batch_losses).abs().cpu()
    # One point per stretch of steps, its largest: a thousand points would be a smear.
    num_points = min(80, len(difference))
    parts = difference.tensor_split(num_points)
    values = [max(part.max().item(), 1e-17) for part in parts]
    when = [settings.epochs * (index + 1) / num_points for index in range(num_points)]
    axes.plot(when, values, **style)


def _finish(axes: Any, title: str, settings: Settings, *, log: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=10)
    axes.set_xlabel("epochs")
    axes.set_xlim(0, settings.epochs)
    if log:
        axes.set_yscale("log")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.minorticks_off()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _write_titles(figure: Any, first: Any, settings: Settings, num_steps: int) -> None:
    figure.subplots_adjust(left=0.055, right=0.98, top=0.72, bottom=0.12, wspace=0.2)
    figure.text(
        0.03,
        0.935,
        "Same weights, same batches: only the BatchNorm statistics differ",
        fontsize=16,
        weight="bold",
    )
    images = "1 image" if BATCH_PER_RANK == 1 else f"{BATCH_PER_RANK} images"
    ranks = "1 rank" if settings.world_size == 1 else f"{settings.world_size} ranks"
    figure.text(
        0.03,
        0.885,
        f"Residual network on handwritten digits, {ranks}, {images} per rank, {num_steps} steps, "
        "float64",
        color="#6b7280",
    )
    handles, labels = first.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.022, 0.875),
        ncols=4,
        frameon=False,
        handlelength=2.2,
        columnspacing=2.4,
    )
