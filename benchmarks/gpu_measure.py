"""What the GPU benchmarks share: the device, the copy bandwidth, times of captured graphs."""

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def require_gpu() -> torch.device:
    """The GPU; ends the program with a message where there is none."""
    if not torch.cuda.is_available():
        sys.exit(
            f"{sys.argv[0]}: this machine has no GPU that torch {torch.__version__} sees, so there "
            "is nothing to measure. Its results are unmeasured until it runs on one."
        )
    return torch.device("cuda")


def gpu() -> dict[str, Any]:
    """What a number depends on besides what ``measure.machine`` says."""
    properties = torch.cuda.get_device_properties(0)
    import triton

    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_megabytes": properties.L2_cache_size / 2**20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }


def one_rank_group() -> str:
    """Name of a process group of this process alone, whose collectives run on the GPU."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return group.group_name


_CALLS = 24
"""Calls of a graph, at least: to start one takes some 9 microseconds."""


def milliseconds(functions: Sequence[Callable[[], object]], *, repeats: int = 20) -> float:
    """Median time of a call on the device, launches excluded: all calls are one CUDA graph.

    Args:
        functions: the same work on different tensors, so that no call finds its input in the cache
            because the one before has left it there.
        repeats: timed replays.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    turns = -(-_CALLS // len(functions))
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for function in functions:
                function()
    return timed(graph.replay, repeats=repeats) / (turns * len(functions))


def timed(function: Callable[[], object], *, repeats: int, warmup: int = 3) -> float:
    """Median time of a call between two events, in milliseconds."""
    times = []
    for index in range(-warmup, repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if index >= 0:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per millisecond that a large copy reads and writes; in a graph it is slower."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    time = timed(lambda: target.copy_(source), repeats=20)
    return 2 * source.numel() * source.element_size() / time


@functools.cache
def copy_milliseconds(num_bytes: int) -> float:
    """Time of a copy that reads and writes so many bytes together, from and to memory."""

    def make(_: int) -> tuple[Tensor, Tensor]:
        source = torch.randint(256, (num_bytes // 2,), device="cuda", dtype=torch.uint8)
        return source, torch.empty_like(source)

    sets = sets_beyond_cache(make, num_bytes)

    def copy(source: Tensor, target: Tensor) -> Callable[[], object]:
        return lambda: target.copy_(source)

    return milliseconds([copy(*pair) for pair in sets])


def sets_beyond_cache(make: Callable[[int], Any], num_bytes: int) -> list[Any]:
    """As many sets of tensors of ``num_bytes`` each as exceed the cache, at least two."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [make(index) for index in range(max(2, min(16, -(-4 * cache // max(num_bytes, 1)))))]


def assert_close(ours: Sequence[Tensor], exact: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Our errors against float64 are at most twice theirs, or of rounding size.

    Raises:
        AssertionError: there is no use in timing a wrong result.
    """
    for one, best, other in zip(ours, exact, theirs, strict=True):
        scale = best.abs().max().item() + 1e-30
        error, allowed = ((t.double() - best).abs().max().item() / scale for t in (one, other))
        assert error <= 2 * allowed + 4 * torch.finfo(one.dtype).eps, (error, allowed)
