"""One site on the CPU against ``F.batch_norm``: forward plus backward.

Every distinct BatchNorm input of ResNet-50 at batch 32, in float32 and bfloat16, contiguous and
channels-last. Two sites: ``alone`` shares its statistics with nobody; ``shared`` does, with the
collective left out. Bars: geometric mean of the ratios at most 1.0, none above 1.3. The results are
compared with float64 as well: errors at most twice those of ATen.

Freed memory is kept for the next tensor, unless told otherwise: see ``keep_freed_memory``.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import (
    arguments,
    finish,
    geometric_mean,
    interleaved,
    keep_freed_memory,
    leave_out_collectives,
    ratio,
)
from torch import Tensor
from torch.nn import functional as F

import bnrewrite  # noqa: F401  (registers the op)

SHAPES = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28),
    (256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
]  # fmt: skip
"""Channels and image side of every distinct BatchNorm input of torchvision's ResNet-50."""

BATCH = 32


class Case:
    """One input with its gradient, and the two ways to evaluate it."""

    def __init__(self, channels: int, side: int, dtype: torch.dtype, layout: str) -> None:
        memory_format = (
            torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )
        torch.manual_seed(0)

        def image() -> Tensor:
            values = torch.randn(BATCH, channels, side, side).to(dtype)
            return values.contiguous(memory_format=memory_format)

        self.x = image().requires_grad_()
        self.grad = image()
        self.weight = torch.rand(channels).requires_grad_()
        self.bias = torch.randn(channels).requires_grad_()
        self.mean, self.var = torch.zeros(channels), torch.ones(channels)
        self.count = torch.tensor(0)
        self.megabytes = self.x.numel() * self.x.element_size() / 2**20

    def _backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return (y, *torch.autograd.grad(y, (self.x, self.weight, self.bias), self.grad))

    def aten(self) -> tuple[Tensor, ...]:
        """Output and gradients of x, weight and bias."""
        mean, var, weight, bias = self.mean, self.var, self.weight, self.bias
        return self._backward(F.batch_norm(self.x, mean, var, weight, bias, True))

    def ours(self, group: str) -> tuple[Tensor, ...]:
        """As :meth:`aten`."""
        tensors = (self.weight, self.bias, self.mean, self.var, self.count)
        y = torch.ops.bnrewrite.batch_norm(self.x, *tensors, True, True, 0.1, 1e-5, group)
        return self._backward(y)

    def error_ratios(
        self, variants: dict[str, Callable[[], tuple[Tensor, ...]]]
    ) -> dict[str, float]:
        """The largest error of each variant over that of ATen, against float64."""
        x, weight, bias = (
            tensor.detach().double().requires_grad_() for tensor in (self.x, self.weight, self.bias)
        )
        y = F.batch_norm(x, None, None, weight, bias, True)
        exact = (y, *torch.autograd.grad(y, (x, weight, bias), self.grad.double()))

        def errors(function: Callable[[], tuple[Tensor, ...]]) -> list[float]:
            results = zip(function(), exact, strict=True)
            return [(one.double() - best).norm().item() for one, best in results]

        aten = errors(self.aten)
        return {
            name: max(ours / theirs for ours, theirs in zip(errors(variant), aten, strict=True))
            for name, variant in variants.items()
        }

    def measured(self, groups: dict[str, str], rounds: int) -> dict[str, Any]:
        """Milliseconds of each variant, ratios to ATen's, and ratios of errors."""
        ours = {name: functools.partial(self.ours, group) for name, group in groups.items()}
        row = {"error_ratios": self.error_ratios(ours)}
        rounds *= 3 if self.megabytes < 16 else 1
        seconds = interleaved({**ours, "aten": self.aten}, rounds=rounds, clock=time.process_time)
        row["ms"] = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
        row["ratios"] = {name: ratio(seconds, name, "aten") for name in ours}
        return row


def line(row: dict[str, Any]) -> str:
    """A row of the table that is printed."""
    shape = "x".join(map(str, row["shape"]))
    text = f"{shape:>18} {row['dtype']:>9} {row['layout']:>14} {row['megabytes']:6.1f}"
    text += "".join(f"{row['ms'][name]:8.1f}" for name in ("alone", "shared", "aten"))
    return text + "".join(f"{row['ratios'][name]:8.2f}" for name in ("alone", "shared"))


def summary(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Means and largest ratios of one of the two sites."""
    kinds = dict.fromkeys((row["dtype"], row["layout"]) for row in rows)
    return {
        "geometric_mean": geometric_mean([row["ratios"][name] for row in rows]),
        "largest": max(row["ratios"][name] for row in rows),
        "largest_error_ratio": max(row["error_ratios"][name] for row in rows),
        "geometric_means": {
            " ".join(kind): geometric_mean(
                [row["ratios"][name] for row in rows if (row["dtype"], row["layout"]) == kind]
            )
            for kind in kinds
        },
    }


def main() -> None:
    options = arguments(
        __doc__, rounds=9, switches={"system-malloc": "let the C library return freed memory"}
    )
    torch.set_num_threads(1)
    allocator = "as the system has it" if options.system_malloc else keep_freed_memory()
    leave_out_collectives()
    groups = {"alone": "", "shared": "left out"}
    rows = []
    print(f"{'input':>18} {'dtype':>9} {'layout':>14} {'MB':>6}", end="")
    print("   alone  shared    aten (ms) alone  shared (ratio to aten)")
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            for channels, side in SHAPES:
                case = Case(channels, side, dtype, layout)
                row = {
                    "shape": [BATCH, channels, side, side],
                    "dtype": str(dtype).removeprefix("torch."),
                    "layout": layout,
                    "megabytes": case.megabytes,
                    **case.measured(groups, options.rounds),
                }
                rows.append(row)
                print(line(row))
    result: dict[str, Any] = {name: summary(rows, name) for name in groups}
    for name, numbers in result.items():
        print(f"{name}: geometric mean {numbers['geometric_mean']:.2f} (bar 1.0)", end=" ")
        print({kind: round(mean, 2) for kind, mean in numbers["geometric_means"].items()}, end=" ")
        print(f"largest {numbers['largest']:.2f} (bar 1.3),", end=" ")
        print(f"largest error {numbers['largest_error_ratio']:.2f} times ATen's (bar 2)")
    print(f"allocator: {allocator}")
    finish(__file__, {**result, "allocator": allocator, "cases": rows}, save=options.save)


if __name__ == "__main__":
    main()
