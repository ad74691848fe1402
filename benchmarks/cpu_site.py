"""One site on the CPU, collective left out, against ``F.batch_norm``: forward plus backward.

Every distinct BatchNorm input of ResNet-50 at batch 32, in float32 and bfloat16, contiguous and
channels-last. Bars: geometric mean of the ratios at most 1.0, none above 1.3. The results are
compared with float64 as well: errors at most twice those of ATen.
"""

import statistics
from collections.abc import Callable

import torch
from measure import arguments, finish, geometric_mean, interleaved, ratio
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

    def ours(self) -> tuple[Tensor, ...]:
        """As :meth:`aten`."""
        tensors = (self.weight, self.bias, self.mean, self.var, self.count)
        y = torch.ops.bnrewrite.batch_norm(self.x, *tensors, True, True, 0.1, 1e-5, "")
        return self._backward(y)

    def error_ratio(self) -> float:
        """The largest error of ours over that of ATen, against float64, over all four results."""
        x, weight, bias = (
            tensor.detach().double().requires_grad_() for tensor in (self.x, self.weight, self.bias)
        )
        y = F.batch_norm(x, None, None, weight, bias, True)
        exact = (y, *torch.autograd.grad(y, (x, weight, bias), self.grad.double()))

        def errors(function: Callable[[], tuple[Tensor, ...]]) -> list[float]:
            results = zip(function(), exact, strict=True)
            return [(one.double() - best).norm().item() for one, best in results]

        pairs = zip(errors(self.ours), errors(self.aten), strict=True)
        return max(ours / aten for ours, aten in pairs)


def main() -> None:
    options = arguments(__doc__, rounds=9)
    torch.set_num_threads(1)
    rows = []
    print(
        f"{'input':>18} {'dtype':>9} {'layout':>14} {'MB':>6} {'ours':>6}  F.batch_norm (ms)  ratio"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            for channels, side in SHAPES:
                case = Case(channels, side, dtype, layout)
                error = case.error_ratio()
                variants = {"ours": case.ours, "aten": case.aten}
                seconds = interleaved(
                    variants, rounds=options.rounds * (3 if case.megabytes < 16 else 1)
                )
                row = {
                    "shape": [BATCH, channels, side, side],
                    "dtype": str(dtype).removeprefix("torch."),
                    "layout": layout,
                    "ours_ms": 1e3 * statistics.median(seconds["ours"]),
                    "aten_ms": 1e3 * statistics.median(seconds["aten"]),
                    "ratio": ratio(seconds, "ours", "aten"),
                    "error_ratio": error,
                }
                rows.append(row)
                print(
                    f"{BATCH}x{channels}x{side}x{side}".rjust(18),
                    f"{row['dtype']:>9} {layout:>14} {case.megabytes:6.1f} {row['ours_ms']:6.1f}",
                    f"{row['aten_ms']:8.1f} {row['ratio']:16.2f}",
                )
    means = {}
    for dtype in ("float32", "bfloat16"):
        for layout in ("contiguous", "channels_last"):
            means[f"{dtype} {layout}"] = geometric_mean(
                [row["ratio"] for row in rows if (row["dtype"], row["layout"]) == (dtype, layout)]
            )
            print(f"{dtype} {layout}: geometric mean {means[f'{dtype} {layout}']:.2f}")
    total = geometric_mean([row["ratio"] for row in rows])
    worst = max(row["ratio"] for row in rows)
    error = max(row["error_ratio"] for row in rows)
    print(f"geometric mean {total:.2f} (bar 1.0), largest {worst:.2f} (bar 1.3),", end=" ")
    print(f"largest error {error:.2f} times ATen's (bar 2)")
    result = {
        "geometric_mean": total, "largest": worst, "largest_error_ratio": error,
        "geometric_means": means, "cases": rows,
    }  # fmt: skip
    finish(__file__, result, save=options.save)


if __name__ == "__main__":
    main()
