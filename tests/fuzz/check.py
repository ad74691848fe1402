"""Comparison of the ranks of a random example with one process, and of passes with no passes."""

import dataclasses
import warnings

import torch
from torch import Tensor

from tests.fuzz.worker import Example, StepResult, run_one_process, run_rank
from tests.ranks import RankPool


class Unfit(Exception):  # noqa: N818
    """An example that says nothing: torch refuses it, or rounding errors decide the outcome."""


@dataclasses.dataclass
class _Expected:
    """One process in float64, and what may differ from it.

    Attributes:
        steps: the results with the batches of all ranks in one tensor.
        buffers: of every rank after each step.
        errors: by how much a run with other rounding errors differs, by kind and step.
        rtol: floor of the tolerance, relative to the largest value of a kind.
    """

    steps: list[StepResult]
    buffers: list[list[dict[str, Tensor]]]
    errors: dict[tuple[str, int], float]
    rtol: float


def check(example: Example, pool: RankPool) -> bool:
    """Runs one example on its ranks and raises where something differs.

    Returns:
        Whether passes made some sites share a collective.

    Raises:
        Unfit: the example says nothing.
        AssertionError: what differs.
    """
    world_size = len(example["steps"][0]["sizes"])
    # Random draws on ranks are others than in one process with all samples.
    alone = world_size == 1 or not _drops(example["net"])
    fit = _expect(example)
    expected = fit if alone else None
    results = _run(pool, world_size, example)
    for rank, variants in enumerate(results):
        for index, steps in enumerate(variants):
            _check_order([step.collectives for step in steps], results[0][index], rank)
            if expected is not None:
                _check_rank(example, expected, steps, rank, f"choice {index} of passes")
            else:
                _check_same(steps, variants[1], rank)
    if expected is not None:
        for index in range(len(results[0])):
            _check_grads(example, expected, [variants[index] for variants in results], index)
    for variants in results:
        for default, without in zip(variants[0], variants[1], strict=True):
            assert len(default.collectives) <= len(without.collectives), "passes added collectives"
    _check_bits(example, results)
    return any(
        len(default.collectives) < len(without.collectives)
        for default, without in zip(*results[0][:2], strict=True)
    )


def _run(pool: RankPool, world_size: int, example: Example) -> list[list[list[StepResult]]]:
    """Results of all ranks. Gloo does not always form a world where ports are many and busy."""
    for _ in range(2):
        try:
            return pool.run(run_rank, world_size, example, timeout_s=150.0)
        except AssertionError as error:
            if "connectFullMesh" not in str(error):
                raise
    return pool.run(run_rank, world_size, example, timeout_s=150.0)


def _drops(net: object) -> bool:
    if isinstance(net, dict):
        return net.get("kind") == "dropout" or any(map(_drops, net.values()))
    return isinstance(net, list) and any(map(_drops, net))


def _expect(example: Example) -> _Expected:
    """The reference, and how it answers to other rounding errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Without interception: does torch refuse what the network changes in place?
            run_one_process(example, intercept=False)
            steps, buffers = run_one_process(example)
            if example["dtype"] == "float64":
                # A thousand rounding errors per value: what they become, ours may become.
                other, other_buffers = run_one_process(example, noise=1e-13)
                rtol, factor, limit = 1e-9, 10.0, 1e-6
            else:
                # Plain torch in the same precision: ours may be a few times as far off.
                dtype = getattr(torch, example["dtype"])
                other, other_buffers = run_one_process(example, dtype)
                rtol, factor, limit = 64 * torch.finfo(dtype).eps, 8.0, 0.05
    except (RuntimeError, ValueError) as error:
        raise Unfit(f"plain torch: {error}") from error
    errors: dict[tuple[str, int], float] = {}
    for step in range(len(steps)):
        for kind in ("outputs", "x_grad", "grads", "buffers"):
            ours = _values(kind, other[step], other_buffers[step])
            theirs = _values(kind, steps[step], buffers[step])
            largest = _largest(theirs)
            pairs = [pair for pair in zip(ours, theirs, strict=True) if pair[1].numel()]
            error = max((_distance(*pair) for pair in pairs), default=0.0)
            if not (error <= limit * max(largest, 1.0) and largest < 1e6):
                raise Unfit(f"{kind} of step {step}: rounding errors become {error:.1e}")
            errors[kind, step] = factor * error
    return _Expected(steps, buffers, errors, rtol)


def _values(kind: str, step: StepResult, buffers: list[dict[str, Tensor]]) -> list[Tensor]:
    if kind == "outputs":
        return step.outputs
    if kind == "x_grad":
        return [] if step.x_grad is None else [step.x_grad]
    if kind == "grads":
        return [grad for grad in step.grads or [] if grad is not None]
    return [buffer for one in buffers for buffer in one.values()]


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max())


def _largest(values: list[Tensor]) -> float:
    return max((float(value.double().abs().max()) for value in values if value.numel()), default=0)


def _check_rank(
    example: Example, expected: _Expected, steps: list[StepResult], rank: int, what: str
) -> None:
    for index, (step, theirs) in enumerate(zip(steps, expected.steps, strict=True)):
        sizes = example["steps"][index]["sizes"]
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        place = f"step {index}, rank {rank}, {what}"
        assert len(step.outputs) == len(theirs.outputs), place
        for number, (out, full) in enumerate(zip(step.outputs, theirs.outputs, strict=True)):
            _close(expected, "outputs", index, out, full[rows], f"output {number}, {place}")
        assert (step.x_grad is None) == (theirs.x_grad is None), f"input gradient, {place}"
        if step.x_grad is not None and theirs.x_grad is not None:
            grad = theirs.x_grad[rows]
            _close(expected, "x_grad", index, step.x_grad, grad, f"input gradient, {place}")
        for name, buffer in expected.buffers[index][rank].items():
            _close(expected, "buffers", index, step.buffers[name], buffer, f"{name}, {place}")


def _check_grads(
    example: Example, expected: _Expected, ranks: list[list[StepResult]], choice: int
) -> None:
    """Gradients of parameters, summed over the ranks."""
    for index, theirs in enumerate(expected.steps):
        if theirs.grads is None:
            continue
        parts = [steps[index].grads for steps in ranks]
        for number, full in enumerate(theirs.grads):
            own = [part[number] for part in parts if part is not None]
            place = f"gradient of parameter {number}, step {index}, choice {choice} of passes"
            given = [one for one in own if one is not None]
            if full is None:
                # A parameter of a layer that saw no samples at all has a gradient of zeros.
                assert not any(bool(one.any()) for one in given), place
                continue
            assert len(given) == len(own), f"{place}: some ranks have none"
            _close(expected, "grads", index, torch.stack(given).double().sum(0), full, place)


def _close(
    expected: _Expected, kind: str, step: int, ours: Tensor, theirs: Tensor, what: str
) -> None:
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, {tuple(theirs.shape)}"
    if not theirs.numel():
        return
    largest = _largest(_values(kind, expected.steps[step], expected.buffers[step]))
    error = _distance(ours, theirs)
    tolerance = expected.errors[kind, step] + expected.rtol * max(largest, 1.0)
    assert error <= tolerance, f"{what}: off by {error:.2e}, tolerance {tolerance:.2e}"


def _check_same(steps: list[StepResult], without: list[StepResult], rank: int) -> None:
    """With and without passes the same numbers, but for the order of sums; same random draws."""
    for index, (step, other) in enumerate(zip(steps, without, strict=True)):
        pairs = list(zip(step.outputs, other.outputs, strict=True))
        pairs += [(step.buffers[name], buffer) for name, buffer in other.buffers.items()]
        if step.x_grad is not None and other.x_grad is not None:
            pairs.append((step.x_grad, other.x_grad))
        for ours, theirs in pairs:
            scale = max(_largest([theirs]), 1.0)
            rtol = 1e-7 if theirs.dtype in (torch.float64, torch.int64) else 0.05
            error = _largest([ours.double() - theirs.double()])
            assert error <= rtol * scale, f"step {index}, rank {rank}: passes change {error:.2e}"


def _check_order(
    ours: list[list[tuple[str, torch.dtype, int]]], first: list[StepResult], rank: int
) -> None:
    """Ranks communicate in the same order; a group of one rank does not communicate."""
    for index, (seen, other) in enumerate(zip(ours, first, strict=True)):
        theirs = other.collectives
        assert seen == theirs or not seen or not theirs, (
            f"step {index}: rank {rank} sends {seen}, rank 0 {theirs}"
        )


def _check_bits(example: Example, results: list[list[list[StepResult]]]) -> None:
    """Ranks that share all statistics hold the same buffers bit for bit."""
    if set(example["modes"]) != {"sync"} or any(
        what in ("track",) for step in example["steps"] for what, _, _ in step["changes"]
    ):
        return
    for group in example["groups"] or [list(range(len(results)))]:
        for index in range(len(results[0])):
            for step, first in enumerate(results[group[0]][index]):
                for rank in group[1:]:
                    own = results[rank][index][step].buffers
                    for name, buffer in first.buffers.items():
                        same = torch.equal(own[name], buffer) or bool(buffer.isnan().any())
                        assert same, f"{name} differs between ranks {group[0]} and {rank}"
