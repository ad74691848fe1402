"""Running graphs of AOTAutograd node by node with a clock: what hides a collective."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from bnrewrite.collectives import WAIT, is_launch
from bnrewrite.compiler import HideCollectives, split_convolution_backward

_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default

Span = tuple[fx.Node, float, float]
"""A node and when it ran, in seconds of ``time.perf_counter``."""


class Clock(fx.Interpreter):
    """Runs a graph and notes when each node ran."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.spans: list[Span] = []

    def run_node(self, n: fx.Node) -> Any:
        """As ``fx.Interpreter``, with the clock."""
        start = time.perf_counter()
        result = super().run_node(n)
        if n.op == "call_function":
            self.spans.append((n, start, time.perf_counter()))
        return result


def clocked_backend(
    clocks: list[Clock], *, scheduled: bool, split: bool = True
) -> Callable[..., Any]:
    """A backend of ``torch.compile`` that runs its graphs under clocks: forward, then backward.

    Args:
        clocks: gets the clock of each graph.
        scheduled: hide collectives.
        split: without hiding, split the backward of convolutions all the same.
    """

    def compiler(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        if scheduled:
            HideCollectives()(module.graph)
        elif split:
            split_convolution_backward(module.graph)
        module.recompile()
        clock = Clock(module)
        clocks.append(clock)

        def run(args: list[Any]) -> Any:
            inputs = list(args)
            args.clear()
            clock.spans = []
            return clock.run(*inputs)

        run._boxed_call = True  # pyright: ignore
        return run

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def is_weight_gradient(node: fx.Node) -> bool:
    """Whether ``node`` is the weight half of a convolution's backward."""
    return node.target is _CONVOLUTION_BACKWARD and not node.args[-1][0]  # pyright: ignore


def waits(spans: list[Span]) -> list[float]:
    """Seconds that each wait for a collective of this graph took, in order."""
    return [
        end - start
        for node, start, end in spans
        if node.target is WAIT and is_launch(node.args[0].target)  # pyright: ignore
    ]


def coverable(spans: list[Span]) -> list[float]:
    """Seconds of the weight gradients that are ready when each collective is launched.

    ``spans`` are those of the unscheduled graph: a weight gradient can cover the collective that
    comes after it.
    """
    found, pending = [], 0.0
    for node, start, end in spans:
        if is_weight_gradient(node):
            pending += end - start
        elif is_launch(node.target):
            found.append(pending)
            pending = 0.0
    return found


def hidden_share(
    model: nn.Module, images: Tensor, labels: Tensor, delay: float, rounds: int
) -> float:
    """How much of the latency that weight gradients can cover the schedule hides, in backward.

    Above 1 other work hides some, too.

    Args:
        model: a converted model.
        images: (N, C, H, W).
        labels: (N,).
        delay: seconds that every collective takes.
        rounds: steps of either schedule; medians of each collective count.
    """
    before = _medians(model, images, labels, rounds, scheduled=False)
    after = _medians(model, images, labels, rounds, scheduled=True)
    possible = sum(min(delay, seconds) for _, seconds in before)
    # Ranks also wait for the slower one of them, with either schedule.
    gained = sum(wait for wait, _ in before) - sum(wait for wait, _ in after)
    return gained / possible


def _medians(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    rounds: int,
    *,
    scheduled: bool,
) -> list[tuple[float, float]]:
    """For each collective of the backward what it was waited for, and what could cover it.

    Seconds, medians over steps.
    """
    clocks: list[Clock] = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=clocked_backend(clocks, scheduled=scheduled))
    found = []
    for index in range(rounds + 2):
        _step(compiled, images, labels)
        if index >= 2:
            spans = clocks[1].spans
            found.append([*waits(spans), *coverable(spans)])
    medians = [statistics.median(values) for values in zip(*found, strict=True)]
    half = len(medians) // 2
    return list(zip(medians[:half], medians[half:], strict=True))


def _step(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
    nn.functional.cross_entropy(model(images), labels).backward()
