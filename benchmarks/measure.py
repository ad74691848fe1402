"""What the benchmarks share: interleaved timing, description of the machine, result files."""

import argparse
import ctypes
import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import bnrewrite.collectives
import bnrewrite.ops.normalize_sites

RESULTS = Path(__file__).parent / "results"


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int = 1,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each variant: A B C, A B C, ..., so that a busy machine slows all alike.

    Args:
        variants: what to time, by name.
        rounds: how often each variant is timed.
        calls: calls per timing.
        warmup: untimed rounds before.
        clock: seconds; where one thread computes and nobody waits, ``time.process_time`` leaves out
            what other programs on the machine take.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(-warmup, rounds):
        for name, function in variants.items():
            start = clock()
            for _ in range(calls):
                function()
            elapsed = (clock() - start) / calls
            if index >= 0:
                seconds[name].append(elapsed)
    return seconds


def ratio(seconds: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """Ratio of the medians of two variants."""
    return statistics.median(seconds[ours]) / statistics.median(seconds[theirs])


def geometric_mean(values: list[float]) -> float:
    """Mean of ratios."""
    return math.exp(statistics.fmean(map(math.log, values)))


def machine() -> dict[str, Any]:
    """Hardware and versions that a number depends on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")
    return {
        "processor": model or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def leave_out_collectives() -> None:
    """Makes this process rank 0 of two, whose all-reduces of statistics are left out."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    collectives, ops = bnrewrite.collectives, bnrewrite.ops
    for module in (collectives, ops.normalize_sites, ops.end_collective):
        vars(module).update(
            start_all_reduce_sum=lambda packed, *_, **__: [packed],
            end_all_reduce_sum=lambda pending, _: pending[0],
        )


def keep_freed_memory() -> str:
    """Tells the C library to keep freed memory for the next tensor; says whether it does.

    By default glibc returns a tensor of 32 MB and more to the system, and smaller ones when the top
    of its heap has grown past a limit. The next tensor is then mapped page by page, which takes
    several times as long as BatchNorm, and whether that happens to one variant or to the other
    depends on a few bytes in between.
    """
    mmap_threshold, trim_threshold = -3, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1):
        return "freed memory is kept"
    return "as the system has it"


def arguments(
    doc: str | None, *, rounds: int, switches: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """The command line that every benchmark has, with further ``switches`` and their help."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="timings of each variant")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json")
    for name, text in (switches or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()


def finish(script: str, result: Mapping[str, Any], *, save: bool, part: str = "") -> None:
    """Prints where the numbers come from, and stores them with it if ``save``.

    ``part`` is added to the name of the file, where a benchmark measures different things.
    """
    name = Path(script).stem
    record = {
        "benchmark": name + part,
        "command": " ".join([f"python benchmarks/{name}.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine(),
        **result,
    }
    print(f"command: {record['command']}  commit: {record['commit']}")
    print("machine:", ", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    if save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}{part}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written: {path}")


def _commit() -> str:
    """The commit measured; "+" behind it says that files differed from it."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--", "../bnrewrite")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
