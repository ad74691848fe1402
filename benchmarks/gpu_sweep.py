"""The reductions for other ways to cut their inputs: what the constants of ``plan.py`` go by.

A line is a way to cut, a column a case, a number the microseconds of a call: in a CUDA graph, over
inputs that exceed the cache. The first line is what the library does. Results that differ from its
own are named. Kernels are compiled in parallel, before anything is timed.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_measure import copy_milliseconds, gpu, milliseconds, require_gpu, sets_beyond_cache
from measure import arguments, finish
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels.triton import launch
from bnrewrite.kernels.triton.launcher import Launch
from bnrewrite.kernels.triton.plan import Plan, plan_of

EPS = 1e-5

CASES = [
    ((8, 64, 56, 56), torch.float16, "channels-last"),
    ((32, 256, 14, 14), torch.float16, "contiguous"),
    ((128, 512, 7, 7), torch.float16, "contiguous"),
    ((32, 256, 56, 56), torch.bfloat16, "contiguous"),
    ((2, 64, 256, 512), torch.float32, "contiguous"),
    ((2, 64, 256, 512), torch.float32, "channels-last"),
    ((2, 270, 128, 256), torch.float32, "channels-last"),
    ((16, 2048, 32, 32), torch.bfloat16, "channels-last"),
    ((128, 512, 28, 28), torch.bfloat16, "contiguous"),
    ((128, 512, 28, 28), torch.bfloat16, "channels-last"),
    ((128, 256, 56, 56), torch.float32, "contiguous"),
    ((128, 256, 56, 56), torch.bfloat16, "channels-last"),
]


@dataclasses.dataclass(frozen=True)
class Way:
    """What differs from a plan; None where nothing does.

    Attributes:
        values: of a tile, as a multiple of what the plan has.
        columns: of a tile, in channels-last.
        programs: per multiprocessor.
        warps: of a program.
        stages: see :attr:`Plan.STAGES`.
    """

    values: float | None = None
    columns: int | None = None
    programs: float | None = None
    warps: int | None = None
    stages: int | None = None

    def __str__(self) -> str:
        changes = dataclasses.asdict(self).items()
        return " ".join(f"{name} {value}" for name, value in changes if value) or "as planned"

    def of(self, plan: Plan, multiprocessors: int) -> Plan | None:
        """The plan with these changes; None where they are not possible."""
        tile = plan.tile
        block_c = self.columns if self.columns and tile.LAST else tile.BLOCK_C
        values = int((self.values or 1) * tile.BLOCK_C * tile.BLOCK_S)
        if tile.LAST:
            span = max(values // block_c, 1)
        else:
            span = tile.SPAN
            block_c = max(values // tile.BLOCK_S, 1)
        if tile.has_parts and block_c != tile.BLOCK_C:
            return None
        tile = tile._replace(BLOCK_C=block_c, SPAN=span)
        num_blocks = -(-plan.C * tile.P // block_c) if not tile.GROUP else plan.num_blocks
        num_tiles = -(-tile.N // tile.images) * -(-tile.S // span)
        num_splits = plan.num_splits
        if self.programs:
            num_splits = max(1, int(multiprocessors * self.programs) // num_blocks)
        each = -(-num_tiles // num_splits)
        changed = dataclasses.replace(
            plan,
            tile=tile,
            num_blocks=num_blocks,
            num_tiles=num_tiles,
            num_splits=-(-num_tiles // each),
            num_warps=self.warps or plan.num_warps,
            STAGES=1 if each == 1 else self.stages or max(plan.STAGES, 3),
        )
        return changed if self != Way() else plan


def ways() -> Iterator[Way]:
    """The plan itself, then one change at a time, then some together."""
    yield Way()
    yield from (Way(values=value) for value in (0.5, 2.0, 4.0))
    yield from (Way(columns=value) for value in (16, 64, 128))
    yield from (Way(programs=value) for value in (0.5, 1, 2, 3, 4))
    yield from (Way(warps=value) for value in (2, 4, 8))
    yield from (Way(stages=value) for value in (2, 4, 6))
    for values, programs, stages in itertools.product((1.0, 2.0), (1, 2, 3), (4, 6)):
        yield Way(values=values, programs=programs, stages=stages)
        yield Way(values=values, programs=programs, stages=stages, columns=64)


class Case:
    """Inputs of one reduction, and its launch."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, layout: str, *, is_backward: bool
    ) -> None:
        def image() -> Tensor:
            values = torch.randn(shape, device="cuda", dtype=dtype)
            return (
                values
                if layout == "contiguous"
                else values.movedim(1, -1).contiguous().movedim(-1, 1)
            )

        self.is_backward = is_backward
        self.x = image()
        if is_backward:
            self.grad, self.y, self.inner = image(), image(), image()
        totals = reference.moments(self.x)
        self.stats = reference.statistics(totals, EPS, torch.float32)

    def launch(self, plan: Plan) -> tuple[Launch, Tensor]:
        """The launch, and what it fills."""
        C = self.x.size(1)
        if not self.is_backward:
            packed = self.x.new_empty(2 * C + 1, dtype=torch.float64)
            return launch.moments(plan, self.x, packed), packed
        sums = self.x.new_empty(2 * C, dtype=torch.float64)
        gradients = sums.new_empty(2 * C, dtype=torch.float32)
        own = launch.Reduced(self.x, self.stats, None, None, sums, gradients)
        args = (self.grad, own, None, self.y, self.inner, "relu", 0.0)
        return launch.normalize_backward_reduce(plan, *args), sums

    def run(self, plan: Plan) -> Tensor:
        """Launches, and what that fills."""
        one, result = self.launch(plan)
        one.run()
        return result


def _compile(plans: list[tuple[Plan, torch.dtype]], is_backward: bool) -> None:
    """Puts kernels into the cache of Triton."""
    for plan, dtype in plans:
        case = Case((2, 2, 2), dtype, "contiguous", is_backward=is_backward)
        one, _ = case.launch(plan)
        one.kernel.warmup(*one.args, grid=(1, 1, 1), **one.constants, **one.options)


def compile_all(plans: list[tuple[Plan, torch.dtype]], is_backward: bool) -> None:
    """As :func:`_compile`, in as many processes as there are cores."""
    number = min(os.cpu_count() or 1, 16)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(number, mp_context=context) as pool:
        parts = [plans[first::number] for first in range(number)]
        list(pool.map(_compile, parts, itertools.repeat(is_backward)))


def timed(cases: list[Case], plan: Plan, expected: Tensor, rounds: int) -> tuple[float | None, str]:
    """Microseconds, and what is wrong."""
    try:
        torch.testing.assert_close(cases[0].run(plan), expected, rtol=1e-4, atol=1.0)
        calls: list[Callable[[], object]] = [lambda case=case: case.run(plan) for case in cases]
        return milliseconds(calls, repeats=rounds) * 1e3, ""
    except Exception as error:
        # A way that needs more than the device has, or a wrong one: the others are of interest.
        return None, str(error).splitlines()[0][:80]


def main() -> None:
    options = arguments(
        __doc__, rounds=6, switches={"backward": "the reduction of the backward, not the moments"}
    )
    require_gpu()
    multiprocessors = gpu()["multiprocessors"]
    reads = 2 if options.backward else 1
    known: dict[tuple[Any, ...], list[tuple[Way, Plan]]] = {}
    for shape, dtype, layout in CASES:
        case = Case(shape, dtype, layout, is_backward=False)
        plan = plan_of(case.x, reads=reads)
        assert plan is not None
        cuts: dict[tuple[Any, ...], tuple[Way, Plan]] = {}
        for way in ways():
            cut = way.of(plan, multiprocessors)
            if cut is not None:
                cuts.setdefault(dataclasses.astuple(cut), (way, cut))
        known[shape, dtype, layout] = list(cuts.values())
        del case
    plans = [(plan, dtype) for (_, dtype, _), some in known.items() for _, plan in some]
    compile_all(plans, options.backward)
    table: dict[str, dict[str, float]] = {}
    passes = 4 if options.backward else 1
    for (shape, dtype, layout), some in known.items():
        name = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {layout}"
        num_bytes = math.prod(shape) * dtype.itemsize

        def make(_: int, args: Any = (shape, dtype, layout)) -> Case:
            return Case(*args, is_backward=options.backward)

        cases = sets_beyond_cache(make, num_bytes)
        expected = cases[0].run(some[0][1])
        copy = copy_milliseconds(passes * num_bytes) * 1e3
        print(f"{name}: a copy of as many bytes takes {copy:.1f}", flush=True)
        table.setdefault("copy", {})[name] = copy
        for way, plan in some:
            time, wrong = timed(cases, plan, expected, options.rounds)
            if time is not None:
                table.setdefault(str(way), {})[name] = time
            print(f"  {way!s:50} {wrong or f'{time:7.1f}'}", flush=True)
        del cases
    finish(__file__, {"gpu": gpu(), "microseconds": table}, save=options.save)


if __name__ == "__main__":
    main()
