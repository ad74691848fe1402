"""Draws one training step: what computes and what communicates when, before and after.

    python benchmarks/timeline.py step.png

Two gloo ranks with a delay added to every collective (delayed_group.py) run a small ResNet-18,
compiled with ``aot_eager``. Above, every site has its own collectives and waits for them at once;
below, sites share collectives, and other work runs meanwhile. Drawn is what rank 0 measured.
"""

import argparse
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from delayed_group import TIMELINE, Delay, delayed_gloo
from hidden import Clock, Span, clocked_backend, is_weight_gradient
from latency import BATCH, SIDE, WORLD_SIZE, make, step
from measure import finish
from torch import fx

import bnrewrite

KINDS = {
    "convolution": "#4477aa",
    "weight gradient": "#228833",
    "BatchNorm": "#ccbb44",
    "other": "#bbbbbb",
    "waiting": "#ee6677",
    "collective under way": "#aa3377",
}
"""Kinds of bars with their colors, from a palette that color-blind people can tell apart."""

STEPS = 10
"""Steps of which the shortest is drawn."""

Bar = tuple[str, float, float]


def _kind(node: fx.Node) -> str | None:
    name = str(node.target)
    if "wait_tensor" in name:
        return "waiting"
    if is_weight_gradient(node):
        return "weight gradient"
    if "convolution" in name:
        return "convolution"
    if name.startswith("bnrewrite."):
        return "BatchNorm"
    return None if "getitem" in name or "all_reduce" in name else "other"


def _record(*, ours: bool, rank: int) -> list[Bar]:
    """Bars of one step, in milliseconds since its start."""
    clocks: list[Clock] = []
    torch._dynamo.reset()
    model = bnrewrite.convert(make("resnet18"), passes=None if ours else ())
    backend = clocked_backend(clocks, scheduled=ours, split=ours)
    torch.manual_seed(rank)
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(10, (BATCH,))
    run = step(torch.compile(model, backend=backend, fullgraph=True), images, labels)
    steps = []
    for _ in range(STEPS):
        dist.barrier()
        TIMELINE.clear()
        run()
        steps.append(_bars([span for clock in clocks for span in clock.spans]))
    return min(steps, key=lambda bars: max(end for *_, end in bars))


def _bars(spans: list[Span]) -> list[Bar]:
    start = min(begin for _, begin, _ in spans)
    bars = [(kind, a, b) for node, a, b in spans if (kind := _kind(node)) is not None]
    bars += [("collective under way", a, b) for _, a, b in TIMELINE]
    return [(kind, 1e3 * (a - start), 1e3 * (b - start)) for kind, a, b in bars]


def _rank(rank: int, folder: str, delay_ms: float) -> None:
    torch.set_num_threads(1)
    dist.Backend.register_backend("delayed", delayed_gloo, devices=["cpu"])
    dist.init_process_group(
        "delayed", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    Delay.seconds = delay_ms / 1e3
    bars = {name: _record(ours=name == "ours", rank=rank) for name in ("each", "ours")}
    if rank == 0:
        torch.save(bars, f"{folder}/bars.pt")
    dist.barrier()
    dist.destroy_process_group()


def _draw(bars: dict[str, list[Bar]], delay_ms: float, path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    titles = {
        "each": "one collective per site, waited for at once",
        "ours": "bnrewrite: shared collectives, other work meanwhile",
    }
    longest = max(end for each in bars.values() for _, _, end in each)
    figure, axes = plt.subplots(2, 1, figsize=(13, 5), sharex=True, layout="constrained")
    for ax, (name, each) in zip(axes, bars.items(), strict=True):
        for kind, start, end in each:
            row = 0 if kind == "collective under way" else 1
            ax.barh(row, end - start, left=start, height=0.8, color=KINDS[kind], linewidth=0)
        collectives = sum(kind == "collective under way" for kind, *_ in each)
        waiting = sum(end - start for kind, start, end in each if kind == "waiting")
        total = max(end for *_, end in each)
        ax.set_title(
            f"{titles[name]}: {total:.0f} ms, {collectives} collectives, {waiting:.0f} ms waiting",
            loc="left",
        )
        ax.axvline(total, color="black", linewidth=1)
        ax.set_yticks([0, 1], ["network", "processor"])
        ax.set_xlim(0, 1.01 * longest)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[-1].set_xlabel("milliseconds since the start of the step")
    figure.legend(
        handles=[Patch(color=color, label=kind) for kind, color in KINDS.items()],
        loc="outside lower center", ncols=len(KINDS), frameon=False,
    )  # fmt: skip
    figure.suptitle(
        f"One training step of ResNet-18 on one of {WORLD_SIZE} ranks, collectives of "
        f"{delay_ms:g} ms",
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", help="picture to write, e.g. step.png")
    parser.add_argument("--delay", type=float, default=2.0, metavar="MS", help="of a collective")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, options.delay), nprocs=WORLD_SIZE)
        bars: dict[str, Any] = torch.load(f"{folder}/bars.pt")
    _draw(bars, options.delay, options.path)
    print(f"written: {options.path}")
    finish(__file__, {}, save=False)


if __name__ == "__main__":
    main()
