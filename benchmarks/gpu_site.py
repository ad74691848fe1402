"""One site on a GPU with the sum and the ReLU behind it: forward plus backward, and each kernel.

Against the autograd function of ``nn.SyncBatchNorm`` on a group of one rank, and against
``F.batch_norm``, each followed by the separate sum and ReLU; ours runs its collective on the same
group. Beside each time stands the prediction: the bytes that our kernels count, over the bandwidth
of a large copy. Times are those of the device, in a CUDA graph, over inputs that exceed the cache.

A large copy has no start and no end to speak of, a kernel that reads 64 MB has: the share of a copy
that moves as many bytes in all as the kernel is there, too.

Bars on an H200: at least 2 times as fast as ``nn.SyncBatchNorm`` (geometric mean over the sites of
ResNet-50, each layout), at least 85 % of the copy bandwidth in every kernel on tensors of 64 MB and
more, never slower than ``F.batch_norm`` above 1 MB.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_measure import (
    assert_close,
    copy_bandwidth,
    copy_milliseconds,
    gpu,
    milliseconds,
    one_rank_group,
    require_gpu,
    sets_beyond_cache,
)
from measure import arguments, finish, geometric_mean
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm

from bnrewrite import reference
from bnrewrite.kernels import gpu as kernels
from bnrewrite.kernels.triton import workspace

EPS = 1e-5

RESNET50 = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28),
    (256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
]  # fmt: skip
HRNET = [
    (18, 128, 256),
    (36, 64, 128),
    (72, 32, 64),
    (144, 16, 32),
    (64, 256, 512),
    (270, 128, 256),
]
VIDEO = [(64, 16, 112, 112), (64, 16, 56, 56), (256, 16, 56, 56), (512, 8, 28, 28), (2048, 4, 7, 7)]
PUBLISHED = [
    (32, 4, 224, 224), (128, 16, 224, 224), (64, 64, 112, 112), (32, 256, 56, 56),
    (16, 2048, 32, 32), (4, 32, 16, 16),
]  # fmt: skip


def shapes(quick: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Where a shape comes from, and the shape."""
    for batch in (32,) if quick else (8, 32, 128):
        for channels, side in RESNET50:
            yield f"ResNet-50 at {batch}", (batch, channels, side, side)
    if quick:
        return
    for sizes in HRNET:
        yield "HRNet at 2", (2, *sizes)
    for sizes in VIDEO:
        yield "3-D at 2", (2, *sizes)
    for sizes in PUBLISHED:
        yield "published table", sizes


class Case:
    """Inputs of one shape, and the ways to evaluate the site."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, last: bool, group: str) -> None:
        self.group = group

        def image() -> Tensor:
            values = torch.randn(shape, device="cuda", dtype=dtype)
            return values.movedim(1, -1).contiguous().movedim(-1, 1) if last else values

        self.x = image().requires_grad_()
        self.residual = image().requires_grad_()
        self.grad = image()
        C = shape[1]
        self.weight = torch.rand(C, device="cuda").requires_grad_()
        self.bias = torch.randn(C, device="cuda").requires_grad_()
        self.mean, self.var = torch.zeros(C, device="cuda"), torch.ones(C, device="cuda")
        self.count = torch.tensor(0, device="cuda")

        self._keep_off_zero()

    @torch.no_grad()
    def _keep_off_zero(self) -> None:
        """Moves residuals where a rounding error would decide about the gradient of the ReLU."""
        tensors = (self.x, self.weight, self.bias, self.residual)
        x, weight, bias, residual = (t.double() for t in tensors)
        z = F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS) + residual
        least = 16 * torch.finfo(self.x.dtype).eps
        self.residual += torch.where(z.abs() < least, torch.where(z < 0, -least, least), 0.0)

    def _backward(self, y: Tensor) -> tuple[Tensor, ...]:
        wanted = (self.x, self.weight, self.bias, self.residual)
        return (y, *torch.autograd.grad(y, wanted, self.grad))

    def ours(self) -> tuple[Tensor, ...]:
        """Result and gradients of x, weight, bias and residual."""
        tensors = (self.weight, self.bias, self.mean, self.var, self.count)
        y = torch.ops.bnrewrite.batch_norm_act(
            self.x, *tensors, True, True, 0.1, EPS, self.group, self.residual, "relu", 0.0
        )
        return self._backward(y)

    def plain(self) -> tuple[Tensor, ...]:
        """As :meth:`ours`, by torch's local BatchNorm."""
        y = F.batch_norm(self.x, self.mean, self.var, self.weight, self.bias, True, 0.1, EPS)
        return self._backward(F.relu(y + self.residual, inplace=True))

    def sync(self) -> tuple[Tensor, ...]:
        """As :meth:`ours`, by torch's synchronized BatchNorm."""
        group = torch.distributed.group.WORLD
        y = SyncBatchNorm.apply(
            self.x, self.weight, self.bias, self.mean, self.var, EPS, 0.1, group, 1
        )
        return self._backward(F.relu(y + self.residual, inplace=True))

    def exact(self) -> tuple[Tensor, ...]:
        """As :meth:`ours`, in float64."""
        tensors = (self.x, self.weight, self.bias, self.residual)
        x, weight, bias, residual = (t.detach().double().requires_grad_() for t in tensors)
        y = F.relu(F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS) + residual)
        grads = torch.autograd.grad(y, (x, weight, bias, residual), self.grad.double())
        return (y.detach(), *grads)

    def kernels(self) -> dict[str, tuple[Callable[[], object], int]]:
        """Our kernels with the number of times that they read or write a tensor of this size."""
        x, residual, grad = self.x.detach(), self.residual.detach(), self.grad
        affine = (self.weight.detach(), self.bias.detach())
        totals = kernels.moments(x)
        stats = reference.statistics(totals, EPS, torch.float32)
        running = (self.mean, self.var, self.count, 0.1, False)
        y, _ = kernels.normalize(x, totals, *affine, EPS, *running, residual, "relu")
        sums, inner = kernels.activation_backward_reduce(
            grad, x, stats, *affine, y, "relu", 0.0, True
        )
        return {
            "moments": (lambda: kernels.moments(x), 1),
            "normalize": (
                lambda: kernels.normalize(x, totals, *affine, EPS, *running, residual, "relu"),
                3,
            ),
            "activation_backward_reduce": (
                lambda: kernels.activation_backward_reduce(
                    grad, x, stats, *affine, y, "relu", 0.0, True
                ),
                4,
            ),
            "normalize_backward": (
                lambda: kernels.normalize_backward(inner, x, stats, totals, affine[0], sums),
                3,
            ),
        }


def assert_no_synchronization(case: Case) -> None:
    """Raises where our op waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.ours()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measured(cases: list[Case], bandwidth: float, rounds: int) -> dict[str, Any]:
    """Times, predictions and shares of the copy bandwidth of one shape."""
    case = cases[0]
    assert_close(case.ours(), case.exact(), case.plain())
    assert_no_synchronization(case)
    num_bytes = case.x.numel() * case.x.element_size()
    times = {
        name: milliseconds([getattr(one, name) for one in cases], repeats=rounds)
        for name in ("ours", "plain", "sync")
    }
    row: dict[str, Any] = {"megabytes": num_bytes / 2**20, "ms": times, "kernels": {}}
    # moments 1, normalize 3, the reduction 4, the gradient 3.
    row["predicted_ms"] = 11 * num_bytes / bandwidth
    each = [one.kernels() for one in cases]
    for name, (_, passes) in each[0].items():
        time = milliseconds([one[name][0] for one in each], repeats=rounds)
        row["kernels"][name] = {
            "ms": time,
            "predicted_ms": passes * num_bytes / bandwidth,
            "share_of_copy": passes * num_bytes / bandwidth / time,
            "share_of_small_copy": copy_milliseconds(passes * num_bytes) / time,
        }
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table that is printed."""
    shares = " ".join(f"{one['share_of_copy']:5.2f}" for one in row["kernels"].values())
    return (
        f"{row['of']:>16} {'x'.join(map(str, row['shape'])):>18} {row['dtype']:>9} "
        f"{row['layout']:>14} {row['megabytes']:7.1f} {row['predicted_ms']:8.4f} "
        + "".join(f"{row['ms'][name]:9.4f}" for name in ("ours", "plain", "sync"))
        + f"   {shares}"
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the bars."""
    resnet = [row for row in rows if row["of"].startswith("ResNet")]
    large = [row for row in rows if row["megabytes"] >= 64]

    def least_and_median(share: str) -> dict[str, tuple[float, float]]:
        of_kernel = {
            kernel: [row["kernels"][kernel][share] for row in large]
            for kernel in (large[0]["kernels"] if large else ())
        }
        return {name: (min(v), statistics.median(v)) for name, v in of_kernel.items()}

    return {
        "faster_than_sync": {
            layout: geometric_mean(
                [row["ms"]["sync"] / row["ms"]["ours"] for row in resnet if row["layout"] == layout]
            )
            for layout in ("contiguous", "channels-last")
        },
        "least_and_median_share_of_copy": least_and_median("share_of_copy"),
        "least_and_median_share_of_small_copy": least_and_median("share_of_small_copy"),
        "most_of_plain": max(
            (row["ms"]["ours"] / row["ms"]["plain"] for row in rows if row["megabytes"] > 1),
            default=None,
        ),
    }


def main() -> None:
    options = arguments(__doc__, rounds=20, switches={"quick": "ResNet-50 at batch 32 only"})
    require_gpu()
    group = one_rank_group()
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth: {bandwidth / 1e9:.2f} TB/s; times in ms, forward and backward together")
    print(f"{'of':>16} {'input':>18} {'dtype':>9} {'layout':>14} {'MB':>7} {'bytes':>8}", end="")
    print("     ours    plain     sync   share of copy bandwidth of the four kernels")
    rows = []
    for of, shape in shapes(options.quick):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layout in ("contiguous", "channels-last"):
                num_bytes = torch.Size(shape).numel() * dtype.itemsize

                def make(_: int, shape: Any = shape, dtype: Any = dtype, layout: str = layout):
                    return Case(shape, dtype, layout == "channels-last", group)

                row = {"of": of, "shape": shape, "dtype": str(dtype)[6:], "layout": layout}
                # Graphs keep their counters; those of the last shape are gone.
                workspace._RESERVES.clear()
                row |= measured(sets_beyond_cache(make, num_bytes), bandwidth, options.rounds)
                rows.append(row)
                print(line(row), flush=True)
    result = summary(rows)
    print(result)
    torch.distributed.destroy_process_group()
    finish(
        __file__,
        {"gpu": gpu(), "copy_bytes_per_ms": bandwidth, **result, "cases": rows},
        save=options.save,
    )


if __name__ == "__main__":
    main()
