"""Evaluation and frozen sites: torch's forward bit for bit, and the gradient of the formula.

torch's own gradient is wrong on the CPU where dimensions of size one hide how values are laid out.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnrewrite
from bnrewrite.ops.batch_norm import BATCH_NORM

EPS = 1e-5

SHAPES = [(1, 3, 1, 5), (1, 3, 5, 1), (1, 2, 1, 3, 2), (2, 3, 1, 5), (1, 3, 1, 1), (4, 3, 2, 5)]


def _layouts(tensor: Tensor) -> Iterator[Tensor]:
    """The same values in every order of memory, sizes of one with the strides that follow."""
    seen: set[tuple[int, ...]] = set()
    for order in itertools.permutations(range(tensor.dim())):
        inverse = [order.index(dim) for dim in range(tensor.dim())]
        ordered = tensor.permute(order).contiguous().permute(inverse)
        if ordered.stride() not in seen:
            seen.add(ordered.stride())
            yield ordered


def _by_formula(x: Tensor, grad: Tensor, norm: Any) -> list[Tensor]:
    """Gradients of input, weight and bias, in float64 and without torch's kernels."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    x, grad = x.detach().double(), grad.double()
    rstd = (norm.running_var.double() + EPS).rsqrt().view(shape)
    x_hat = (x - norm.running_mean.double().view(shape)) * rstd
    dx = grad * norm.weight.detach().double().view(shape) * rstd
    return [dx, (grad * x_hat).sum(dims), grad.sum(dims)]


def _norm(num_channels: int, dtype: torch.dtype) -> Any:
    norm: Any = nn.BatchNorm2d(num_channels, dtype=dtype)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return norm


def _evaluate(norm: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, list[Any]]:
    norm.zero_grad()
    x = x.detach().requires_grad_()
    y = BATCH_NORM(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, None, False, True,
        0.1, EPS, "",
    )  # fmt: skip
    y.backward(grad)
    return y.detach(), [x.grad, norm.weight.grad, norm.bias.grad]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_the_formula_in_every_layout(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm = _norm(shape[1], dtype)
    values, slopes = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    # bfloat16 rounds results to 8 bits and sums in float32.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for x, grad in itertools.product(_layouts(values), _layouts(slopes)):
        y, gradients = _evaluate(norm, x, grad)
        theirs = F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, EPS
        )
        assert torch.equal(y, theirs)
        assert y.stride() == theirs.stride()
        for ours, exact in zip(gradients, _by_formula(x, grad, norm), strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


class _Turned(nn.Module):
    """The site's result as a column of pixels: its gradient comes back in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = _norm(3, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).permute(3, 2, 1, 0).contiguous().mul(torch.arange(3.0).view(1, 1, 3, 1))


def _gradients(model: Any, run: Any, x: Tensor) -> list[Any]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    run(x).square().sum().backward()
    return [x.grad, model.bn.weight.grad, model.bn.bias.grad]


# Compilers use what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["frozen", "eval"])
def test_so_they_are_in_models_and_compiled(mode: str, backend: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model: Any = _Turned()
    x = torch.randn(1, 3, 1, 5, dtype=torch.float64)
    y = model.eval()(x).permute(3, 2, 1, 0).detach()
    slope = 2 * y * torch.arange(3.0).view(1, 3, 1, 1)
    expected = _by_formula(x, slope, model.bn)
    model = bnrewrite.convert(model, mode if mode == "frozen" else "sync")
    model.train(mode == "frozen")
    run = model if backend == "eager" else torch.compile(model, backend=backend, fullgraph=True)
    for ours, exact in zip(_gradients(model, run, x), expected, strict=True):
        # float64 in another order.
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
