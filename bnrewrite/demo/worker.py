"""What one rank executes, and the run that needs no ranks: ``python -m bnrewrite.demo.worker``."""

import json
import os
import shutil
import sys
import sysconfig
import warnings
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import bnrewrite
from bnrewrite.demo.data import load_digits
from bnrewrite.demo.network import DigitsNet
from bnrewrite.demo.progress import Progress
from bnrewrite.demo.runs import BATCH_PER_RANK, Run, Settings, planned_runs
from bnrewrite.demo.training import Outcome, Plan, train

DTYPE = torch.float64
"""So that what remains between equal runs is visibly rounding and nothing else."""


def uses_gpu(settings: Settings) -> bool:
    """Whether each rank has a GPU of its own."""
    return torch.cuda.is_available() and torch.cuda.device_count() >= settings.world_size


def compile_backend(device: torch.device) -> str:
    """``inductor`` where it can build its kernels, else ``aot_eager``, which needs no compiler."""
    if device.type == "cuda":
        return "inductor"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return "inductor" if shutil.which(compiler) and os.path.exists(header) else "aot_eager"


def make_run(
    run: Run, settings: Settings, device: torch.device, rank: int = 0
) -> tuple[Outcome, DigitsNet]:
    """Makes one of the planned runs; a distributed one needs the default process group."""
    world_size = settings.world_size if run.distributed else 1
    plan = Plan(
        epochs=settings.epochs,
        batch_size=BATCH_PER_RANK * settings.world_size,
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
    )
    data = tuple(part.to(device, DTYPE) for part in load_digits(settings.seed))
    torch.manual_seed(settings.seed)
    network = DigitsNet().to(device, DTYPE)
    if run.mode is not None:
        network = bnrewrite.convert(network, mode=run.mode)
    if run.frozen:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    model: nn.Module = network
    if run.compiled:
        # Inside DDP, whose own forward no compiler captures in full.
        backend = compile_backend(device)
        model = cast(nn.Module, torch.compile(network, fullgraph=True, backend=backend))
    if run.distributed:
        model = DistributedDataParallel(model)
    num_steps = settings.epochs * (len(data[0].labels) // plan.batch_size)
    with Progress(run.title, num_steps, shown=rank == 0) as progress:
        outcome = train(model, network, (data[0], data[1]), plan, progress.step)
    if run.distributed:
        # Ranks hold equal parts, so the loss of the batch is the mean of theirs.
        dist.all_reduce(outcome.batch_losses)
        outcome.batch_losses /= world_size
    outcome.batch_losses = outcome.batch_losses.cpu()
    outcome.state = {name: value.cpu() for name, value in outcome.state.items()}
    return outcome, network


def main(settings: Settings, path: str) -> None:
    """Makes the distributed runs; the first rank writes their outcomes to ``path``."""
    # Compiled 1x1 convolutions give gradients of other strides than DDP's; it says so each time.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    local_rank = int(os.environ["LOCAL_RANK"])
    gpu = uses_gpu(settings)
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpu else "gloo")
    outcomes = {}
    report = ""
    for run in planned_runs(settings):
        if not run.distributed:
            continue
        outcomes[run.key], network = make_run(run, settings, device, dist.get_rank())
        if run.mode is not None:
            report = str(bnrewrite.report(network))
    if dist.get_rank() == 0:
        torch.save({"outcomes": outcomes, "report": report}, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])), sys.argv[2])
