"""The reference answers to torch's own BatchNorm and to autograd, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bnrewrite import reference

# float64 rounds at 1e-16; sums of a hundred values and one division lose two to three digits.
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}

SHAPES = [(5, 3), (2, 1), (7, 3, 5), (1, 2, 9), (2, 3, 4, 5), (3, 1, 1, 2), (2, 3, 2, 3, 2)]


def _inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(shape, dtype=torch.float64) * 3 + 2
    weight = torch.randn(shape[1], dtype=torch.float64)
    bias = torch.randn(shape[1], dtype=torch.float64)
    return x, weight, bias


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_and_finalize_give_mean_and_biased_variance(shape: tuple[int, ...]) -> None:
    x, _, _ = _inputs(shape)
    count, mean, var = reference.finalize(reference.moments(x))
    dims = reference.reduced_dims(x)
    assert count.item() == x.numel() / shape[1]
    torch.testing.assert_close(mean, x.mean(dims), **EXACT)
    torch.testing.assert_close(var, x.var(dims, correction=0), **EXACT)


@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_moments_of_parts_add_up_to_those_of_the_whole(cut: int) -> None:
    x, _, _ = _inputs((7, 3, 5))
    parts = reference.moments(x[:cut]) + reference.moments(x[cut:])
    torch.testing.assert_close(parts, reference.moments(x), **EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "neither"])
def test_normalize_is_batch_norm(shape: tuple[int, ...], affine: str) -> None:
    x, weight, bias = _inputs(shape)
    weight = weight if "weight" in affine else None
    bias = bias if "bias" in affine else None
    y, stats = reference.normalize(x, reference.moments(x), weight, bias, 1e-3)
    expected = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-3)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(stats[0], x.mean(reference.reduced_dims(x)), **EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_backward_is_the_gradient_of_batch_norm(shape: tuple[int, ...], affine: bool) -> None:
    x, weight, bias = _inputs(shape)
    x.requires_grad_()
    arguments = [x]
    if affine:
        arguments += [weight.requires_grad_(), bias.requires_grad_()]
    grad = torch.randn_like(x)
    affine_only: dict[str, Any] = {"weight": weight, "bias": bias} if affine else {}
    y = F.batch_norm(x, None, None, training=True, eps=1e-3, **affine_only)
    expected = torch.autograd.grad(y, arguments, grad)

    x, weight = x.detach(), weight.detach() if affine else None
    totals = reference.moments(x)
    stats = reference.statistics(totals, 1e-3, x.dtype)
    sums = reference.normalize_backward_reduce(grad, x, stats)
    dx = reference.normalize_backward(grad, x, stats, totals, weight, sums)
    torch.testing.assert_close(dx, expected[0], **EXACT)
    if affine:
        torch.testing.assert_close(sums[shape[1] :], expected[1], **EXACT)
        torch.testing.assert_close(sums[: shape[1]], expected[2], **EXACT)


def test_no_values_at_all_give_zeros_and_no_nan() -> None:
    x = torch.empty(0, 3, 4)
    totals = reference.moments(x)
    assert torch.equal(totals, torch.zeros(7, dtype=torch.float64))
    y, stats = reference.normalize(x, totals, None, None, 1e-5)
    assert y.shape == x.shape
    assert stats.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_have_the_dtypes_that_the_docstrings_promise(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 5).to(dtype)
    totals = reference.moments(x)
    y, stats = reference.normalize(x, totals, torch.ones(3), torch.zeros(3), 1e-5)
    sums = reference.normalize_backward_reduce(x, x, stats)
    dx = reference.normalize_backward(x, x, stats, totals, None, sums)
    assert totals.dtype == sums.dtype == torch.float64
    assert y.dtype == dx.dtype == dtype
    assert stats.dtype == torch.float32
