"""What the latency of collectives costs a training step, and how much of it is hidden.

Two ranks, gloo with a delay added to every all-reduce (see delayed_group.py), small images, one
thread per rank, no DDP. Per model, in eager mode and compiled without code generation:

    local        BatchNorm over each rank's own batch: no collectives
    each         one collective per site, waited for at once (passes=()), as everybody does it
    unscheduled  shared, overlapped in forward, and in backward waited for at once
    ours         overlapped in backward, too; compiled with backend="bnrewrite_aot_eager"

Goals: without a delay not slower than the unscheduled step beyond noise; in backward, of the
latency that weight gradients can cover (per collective the smaller of the two), at least 85 %
hidden.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from delayed_group import Delay, delayed_gloo
from hidden import hidden_share
from measure import finish, interleaved
from models import torchvision_model
from torch import Tensor, nn

import bnrewrite
from bnrewrite.passes import OPTIMIZING
from bnrewrite.passes.overlap_backward import overlap_backward

WORLD_SIZE = 2
BATCH = 4
SIDE = 64
DELAYS_MS = (0.0, 1.0, 2.0, 4.0, 10.0)
MODELS = ("resnet18", "resnet50", "googlenet")


def make(name: str) -> nn.Module:
    """A model for small images; auxiliary heads are left out, since losses rarely use them."""
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision_model(name, num_classes=10, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def step(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A forward and a backward."""

    def run() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()

    return run


def variants(name: str, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """The models to compare."""
    others = tuple(one.__name__ for one in OPTIMIZING if one is not overlap_backward)
    models = {
        "local": make(name),
        "each": bnrewrite.convert(make(name), passes=()),
        "unscheduled": bnrewrite.convert(make(name), passes=others),
        "ours": bnrewrite.convert(make(name)),
    }
    if not compiled:
        return dict(models)
    backends = {"ours": "bnrewrite_aot_eager"}
    return {
        key: torch.compile(model, backend=backends.get(key, "aot_eager"), fullgraph=True)
        for key, model in models.items()
    }


def _rank(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.Backend.register_backend("delayed", delayed_gloo, devices=["cpu"])
    dist.init_process_group(
        "delayed", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    torch.manual_seed(rank)
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(10, (BATCH,))
    results: dict[str, Any] = {}
    for name in options.models:
        row = results[name] = {}
        report = bnrewrite.report(bnrewrite.convert(make(name)))
        row["rounds"] = [report.collectives_forward, report.num_communicating]
        for mode in ("eager", "compiled"):
            torch._dynamo.reset()
            steps = {
                key: step(model, images, labels)
                for key, model in variants(name, mode == "compiled").items()
            }
            row[mode] = {}
            for delay in options.delays:
                Delay.seconds = delay / 1e3
                dist.barrier()
                seconds = interleaved(steps, rounds=options.rounds, warmup=2)
                row[mode][f"{delay:g} ms"] = {
                    key: 1e3 * statistics.median(times) for key, times in seconds.items()
                }
        torch._dynamo.reset()
        row["hidden"] = {}
        for delay in options.delays:
            if delay:
                Delay.seconds = delay / 1e3
                model = bnrewrite.convert(make(name))
                row["hidden"][f"{delay:g} ms"] = hidden_share(
                    model, images, labels, delay / 1e3, options.rounds
                )
        if rank == 0:
            _show(name, row)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def _show(name: str, row: dict[str, Any]) -> None:
    rounds, sites = row["rounds"]
    print(f"{name}: {rounds} rounds for {sites} sites, milliseconds per step", flush=True)
    print(f"{'':10}{'delay':>8}{'local':>8}{'each':>8}{'unscheduled':>13}{'ours':>8}  ours / each")
    for mode in ("eager", "compiled"):
        for delay, times in row[mode].items():
            print(
                f"{mode:10}{delay:>8}{times['local']:8.0f}{times['each']:8.0f}"
                f"{times['unscheduled']:13.0f}{times['ours']:8.0f}"
                f"{times['ours'] / times['each']:13.2f}",
                flush=True,
            )
    hidden = ", ".join(f"{delay}: {share:.0%}" for delay, share in row["hidden"].items())
    print(f"  hidden in backward of what weight gradients can cover: {hidden}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--delays", nargs="+", type=float, default=list(DELAYS_MS), metavar="MS")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each variant")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/latency.json")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, options), nprocs=WORLD_SIZE)
        results = torch.load(f"{folder}/results.pt")
    print(f"{time.time() - start:.0f} s in all")
    finish(__file__, {"models": results}, save=options.save)


if __name__ == "__main__":
    main()
