"""NaN, infinity, large counts and means, small variances: against one process."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bnrewrite
from tests.models import ResidualNet, perturb
from tests.ranks import RankPool

SKIP = bnrewrite.Sync(skip_nonfinite=True)


class NoHostRead(TorchDispatchMode):
    """Fails where a value is read on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._opname not in ("_local_scalar_dense", "item", "nonzero", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


def _poisoned(value: float) -> Tensor:
    """A global batch of six, with one bad value in a single channel of the last rank's rows."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64)
    x[5, 1, 2] = value
    return x


def _rows(rank: int) -> slice:
    return slice(0, 4) if rank == 0 else slice(4, 6)


def _one_site(rank: int, world_size: int, value: float, mode: Any, dtype: torch.dtype) -> Any:
    bn: Any = bnrewrite.convert(nn.BatchNorm1d(3, dtype=dtype), mode)
    before = {name: buffer.clone() for name, buffer in bn.named_buffers()}
    x = _poisoned(value)[_rows(rank)].to(dtype).requires_grad_()
    with NoHostRead():
        y = bn(x)
    (y * torch.arange(y.numel()).view_as(y)).sum().backward()
    return y.detach(), x.grad, dict(bn.named_buffers()), before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_bad_values_do_what_they_do_in_one_process(ranks: RankPool, value: float) -> None:
    bn = nn.BatchNorm1d(3, dtype=torch.float64)
    x = _poisoned(value).requires_grad_()
    y = bn(x)
    weights = [torch.arange(48.0).view(4, 3, 4), torch.arange(24.0).view(2, 3, 4)]
    (y * torch.cat(weights)).sum().backward()
    assert x.grad is not None
    results = ranks.run(_one_site, 2, value, "sync", torch.float64)
    for rank, (ours, grad, buffers, _) in enumerate(results):
        rows = _rows(rank)
        assert bool(ours[:, 1].isnan().all())
        for a, b in ((ours, y.detach()[rows]), (grad, x.grad[rows])):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, equal_nan=True)
        for name, buffer in bn.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0], ids=str)
def test_skip_nonfinite_leaves_the_buffers_of_all_ranks(
    ranks: RankPool, value: float, dtype: torch.dtype
) -> None:
    plain = ranks.run(_one_site, 2, value, "sync", dtype)
    for (y, grad, buffers, before), expected in zip(
        ranks.run(_one_site, 2, value, SKIP, dtype), plain, strict=True
    ):
        assert torch.equal(y.nan_to_num(7.0), expected[0].nan_to_num(7.0))
        assert torch.equal(grad.nan_to_num(7.0), expected[1].nan_to_num(7.0))
        for name, buffer in buffers.items():
            wanted = expected[2] if math.isfinite(value) else before
            assert torch.equal(buffer, wanted[name]), name


def _train_with_a_bad_step(rank: int, world_size: int, passes: Any, compiled: bool) -> list[Tensor]:
    """Three forwards and backwards, of which the second is bad on rank 1."""
    torch.manual_seed(0)
    model: Any = perturb(ResidualNet().double())
    model.bn.momentum = None
    bnrewrite.convert(model, SKIP, passes=passes)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        if step == 1 and rank == 1:
            x[0, 0, 0, 0] = math.nan
        run(x).square().sum().backward()
    return list(model.buffers())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("passes", [(), None], ids=["no passes", "all passes"])
def test_a_bad_step_of_one_rank_leaves_no_trace_in_training(
    ranks: RankPool, passes: Any, compiled: bool
) -> None:
    torch.manual_seed(0)
    model: Any = perturb(ResidualNet().double())
    model.bn.momentum = None
    for step in (0, 2):
        batches = []
        for rank in (0, 1):
            torch.manual_seed(10 * step + rank)
            batches.append(torch.randn(2, 3, 8, 8, dtype=torch.float64))
        model(torch.cat(batches))
    for result in ranks.run(_train_with_a_bad_step, 2, passes, compiled):
        for ours, theirs in zip(result, model.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_skip_nonfinite_in_one_process_and_locally() -> None:
    for mode in (SKIP, bnrewrite.Local(skip_nonfinite=True)):
        for shape in ((6, 3), (2, 3, 4), (2, 3, 64, 64)):
            bn: Any = bnrewrite.convert(nn.Sequential(_norm(shape)), mode)[0]
            x = torch.randn(shape)
            bn(x)
            before = [buffer.clone() for buffer in bn.buffers()]
            x[0, 0] = math.inf
            bn(x)
            assert all(map(torch.equal, bn.buffers(), before))
            bn(torch.randn(shape))
            assert int(bn.num_batches_tracked) == 2
            assert not torch.equal(bn.running_mean, before[0])


def _norm(shape: tuple[int, ...]) -> nn.Module:
    return nn.BatchNorm2d(3) if len(shape) == 4 else nn.BatchNorm1d(3)


@pytest.mark.parametrize("mode", [bnrewrite.Sync, bnrewrite.Local])
def test_skip_nonfinite_must_be_a_flag(mode: Any) -> None:
    with pytest.raises(TypeError, match=r"skip_nonfinite must be True or False, but it is int"):
        mode(skip_nonfinite=1)


def _half_precision(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    bn: Any = bnrewrite.convert(nn.BatchNorm2d(1, momentum=1.0).half())
    bn(_many(rank).half())
    return bn.running_mean, bn.running_var


def _many(rank: int) -> Tensor:
    """40,000 values per rank, so that their number is infinite in float16."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(1, 1, 200, 200, generator=generator) + rank


def test_half_precision_buffers_with_counts_beyond_their_range(ranks: RankPool) -> None:
    x = torch.cat([_many(rank).half().double() for rank in range(2)], dim=2)
    for mean, var in ranks.run(_half_precision, 2):
        assert mean.dtype == var.dtype == torch.float16
        # Rounded once to 11 bits.
        torch.testing.assert_close(mean.double(), x.mean().view(1), rtol=2**-11, atol=0)
        torch.testing.assert_close(var.double(), x.var().view(1), rtol=2**-11, atol=0)


def _normalized(rank: int, world_size: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bn: Any = bnrewrite.convert(nn.BatchNorm2d(x.size(1), momentum=1.0, dtype=x.dtype))
    part = x[_rows(rank)].contiguous()
    return bn(part).detach(), bn.running_mean, bn.running_var


def _images(ratio: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 2, 32, 32, generator=generator, dtype=torch.float64)
    x = x - x.mean((0, 2, 3), keepdim=True)
    return (x + ratio).to(dtype)


@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_large_means(ranks: RankPool, ratio: float, dtype: torch.dtype) -> None:
    """|mean| / std up to a million: as far from float64 as rounding allows, and torch's own is."""
    x = _images(ratio, dtype)
    exact = nn.BatchNorm2d(2, momentum=1.0, dtype=torch.float64)
    y = exact(x.double()).detach()
    own = nn.BatchNorm2d(2, momentum=1.0, dtype=dtype)
    theirs = (own(x).detach().double() - y).abs().max().item()
    assert exact.running_var is not None
    results = ranks.run(_normalized, 2, x)
    # Packed in float64, the sum of squares costs some 1e-16 * (mean / std)^2.
    tiny = 1e-15 * (1 + ratio) ** 2
    for rank, (ours, mean, var) in enumerate(results):
        error = (ours.double() - y[_rows(rank)]).abs().max().item()
        eps = torch.finfo(dtype).eps
        # scale * x and the offset, both of the size of mean / std, are rounded.
        assert error <= max(2 * theirs, eps * (40 + ratio)) + tiny
        assert exact.running_mean is not None
        # Both sum 6144 values, which costs float64 some 1e-14; float32 results are rounded once.
        rounding = max(4 * eps, 1e-13)
        mean_error = (mean.double() - exact.running_mean).abs().max().item()
        assert mean_error <= rounding * (1 + ratio)
        var_error = (var.double() / exact.running_var - 1).abs().max().item()
        assert var_error <= 10 * rounding + tiny


@pytest.mark.parametrize("std", [0.0, 1e-8, 1e-4])
def test_small_variances(ranks: RankPool, std: float) -> None:
    x = _images(0.0, torch.float64) * std + 1.0
    exact = nn.BatchNorm2d(2, momentum=1.0, dtype=torch.float64)
    y = exact(x).detach()
    for rank, (ours, _, var) in enumerate(ranks.run(_normalized, 2, x)):
        # The variance is off by some 1e-16 * mean^2, which eps = 1e-5 hides in the output.
        torch.testing.assert_close(ours, y[_rows(rank)], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(var, exact.running_var, rtol=1e-9, atol=1e-15)
        assert bool((var >= 0).all())


def test_the_comparison_of_bad_values_can_fail() -> None:
    x = _poisoned(math.nan)
    assert not torch.equal(F.batch_norm(x, None, None, training=True).isnan(), x.isnan())
