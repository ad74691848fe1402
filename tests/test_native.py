"""The CPU kernels in C against the reference in float64, and what happens where they do not run."""

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import bnrewrite
from bnrewrite import cli
from bnrewrite import reference as definition
from bnrewrite.activations import ACTIVATIONS, activate, activation_backward
from bnrewrite.kernels import aten as aten_kernels
from bnrewrite.kernels import cpu as cpu_kernels
from bnrewrite.kernels import native as native_kernels
from bnrewrite.kernels.native import load
from bnrewrite.kernels.statistics import statistics_table, track
from bnrewrite.ops.batch_norm import BATCH_NORM
from bnrewrite.settings import kernels_setting
from tests.kernel_cases import EPS, case, check_close, check_moments, laid_out

# Without types: cases pass arguments on in groups.
native: Any = native_kernels
aten: Any = aten_kernels
cpu: Any = cpu_kernels
reference: Any = definition

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = ["contiguous", "channels-last"]
FUSED = ["identity", "relu", "relu6", "leaky_relu"]
SLOPE = 0.25
SHAPES = [
    (1, 1),
    (5, 3),
    (41, 70),
    (2, 3, 7),
    (1, 2, 1, 2),
    (3, 1, 9, 5),
    (3, 7, 7, 9),
    (7, 63, 1, 1),
    (2, 5, 3, 4, 5),
    (2, 3, 70, 90),
    (3, 130, 31, 33),
]
"""Odd sizes: tails of vectors, rows and chunks; rows of more than one chunk; several groups."""

needs_library = pytest.mark.skipif(native.library() is None, reason="the kernels were not built")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a compiler may lack OpenMP")
@pytest.mark.skipif(kernels_setting() == "aten", reason="BNREWRITE_KERNELS leaves them out")
def test_the_library_was_built_if_there_is_a_compiler() -> None:
    assert load.whence() == "C kernels" or shutil.which("gcc") is None


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Threads that torch has, of which a kernel uses all, however small its tensors are."""
    monkeypatch.setattr(native, "_VALUES_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize(
    ("shape", "layout"),
    # Of three dimensions torch knows no such memory format, and of two they are the same.
    [(s, lay) for s in SHAPES for lay in LAYOUTS if lay == "contiguous" or len(s) > 3],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestEveryInput:
    """Each kernel on every shape, layout and dtype."""

    def test_moments(
        self, shape: tuple[int, ...], layout: str, dtype: torch.dtype, threads: int
    ) -> None:
        x = case(shape, layout, dtype, CPU)["x"]
        check_moments(native.moments(x), x)

    @pytest.mark.parametrize("offset", [2e4, -2e4])
    def test_moments_of_a_mean_of_ten_thousand_deviations(
        self, shape: tuple[int, ...], layout: str, dtype: torch.dtype, offset: float
    ) -> None:
        x = case(shape, layout, dtype, CPU, offset=offset)["x"]
        check_moments(native.moments(x), x)

    def test_a_large_mean_costs_nothing_but_in_the_statistics(
        self, shape: tuple[int, ...], layout: str, dtype: torch.dtype
    ) -> None:
        # bfloat16 has not as many digits.
        t = case(shape, layout, dtype, CPU, offset=100.0 if dtype == torch.bfloat16 else 2e4)
        rstd = t["stats"][1].max().item()
        affine = (t["weight"], t["bias"], EPS)
        y, stats = native.normalize(t["x"], t["totals"], *affine, *[None] * 4)
        exact, _ = reference.normalize(t["x"].double(), t["totals"], *affine)
        check_close(y, exact, "y", terms=rstd * 4 + 1)
        dx = native.normalize_backward(
            t["grad"], t["x"], stats, t["totals"], t["weight"], t["sums"]
        )
        exact_dx = reference.normalize_backward(
            t["grad"].double(), t["x"].double(), stats.double(), t["totals"],
            t["weight"].double(), t["sums"],
        )  # fmt: skip
        check_close(dx, exact_dx, "dx", terms=max(rstd, 1.0) * 4 + 1)

    @pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
    @pytest.mark.parametrize("activation", FUSED)
    def test_normalize(
        self,
        shape: tuple[int, ...],
        layout: str,
        dtype: torch.dtype,
        residual: bool,
        activation: str,
        threads: int,
    ) -> None:
        t = case(shape, layout, dtype, CPU)
        other = t["residual"] if residual else None
        args = (t["weight"], t["bias"], EPS)
        end = (other, activation, SLOPE)
        y, stats = native.normalize(t["x"], t["totals"], *args, *[None] * 4, False, *end)
        exact, exact_stats = reference.normalize(t["x"].double(), t["totals"], *args, *end)
        assert y.dtype == dtype
        assert y.stride() == t["x"].stride()
        # rstd is up to 1 / sqrt(eps) where the values of a channel are nearly equal.
        check_close(y, exact, "y", terms=t["stats"][1].max().item() * 4 + 1)
        check_close(stats, exact_stats, "stats")

    @pytest.mark.parametrize("activation", FUSED)
    def test_backward(
        self,
        shape: tuple[int, ...],
        layout: str,
        dtype: torch.dtype,
        activation: str,
        threads: int,
    ) -> None:
        t = case(shape, layout, dtype, CPU)
        kept = laid_out(torch.randn(shape).to(dtype), layout)
        grad, x, stats, weight = (t[name] for name in ("grad", "x", "stats", "weight"))
        wide = [tensor.double() for tensor in (grad, x, stats, weight)]
        act = (activation, SLOPE)
        inner = grad
        if activation == "identity":
            sums = native.normalize_backward_reduce(grad, x, stats)
        else:
            sums, inner = native.activation_backward_reduce(
                grad, x, stats, weight, t["bias"], kept, *act, True
            )
            check_close(inner, activation_backward(wide[0], kept.double(), *act), "inner")
        exact = reference.normalize_backward_reduce(inner.double(), *wide[1:3])
        # A sum of M terms of order one, each rounded before it is added, times rstd.
        terms = (x.numel() / shape[1]) ** 0.5
        rstd = max(stats[1].max().item(), 1.0)
        unit = torch.finfo(stats.dtype).eps
        assert (sums - exact).abs().max().item() <= 16 * terms * rstd * unit
        dx = native.normalize_backward(inner, x, stats, t["totals"], weight, exact)
        assert dx.dtype == dtype
        assert dx.stride() == x.stride()
        exact_dx = reference.normalize_backward(
            inner.double(), *wide[1:3], t["totals"], wide[3], exact
        )
        check_close(dx, exact_dx, "dx", terms=rstd * 4 + 1)


@needs_library
class TestNumbers:
    """What is hard about the numbers."""

    @pytest.mark.parametrize("first", [12, 1])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_beginning_unlike_the_rest(self, layout: str, first: int) -> None:
        """The mean jumps by a thousand deviations, after many chunks or inside of the first."""
        x = torch.randn(1, 2, 90, 90)
        x[:, :, first:] += 1000
        x = laid_out(x, layout)
        _, mean, var = reference.finalize(native.moments(x))
        values = x.double().movedim(1, 0).flatten(1)
        torch.testing.assert_close(mean, values.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(var, values.var(1, correction=0), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_bad_value_spoils_its_channel_and_no_other(self, value: float, layout: str) -> None:
        t = case((3, 4, 13, 11), layout, torch.float32, CPU)
        x, nothing = t["x"], (None, None, EPS, *[None] * 4)
        clean, _ = native.normalize(x, native.moments(x), *nothing)
        x[1, 1, 2, 3] = value
        y, _ = native.normalize(x, native.moments(x), *nothing)
        sums = native.normalize_backward_reduce(t["grad"], x, t["stats"])
        assert y[:, 1].isnan().all()
        assert torch.equal(y[:, ::2], clean[:, ::2])
        assert sums.isfinite().tolist() == [True, True, True, True, True, False, True, True]

    @pytest.mark.parametrize("activation", FUSED[1:])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_activations_of_extreme_values_are_those_of_torch(
        self, activation: str, dtype: torch.dtype
    ) -> None:
        values = [0.0, -0.0, 6.0, 7.0, -7.0, math.inf, -math.inf, math.nan, 1e-38, -1e-38]
        z = torch.tensor(values, dtype=dtype).view(1, 1, -1)
        # Mean zero and rstd one: the kernel adds the values to zeros and activates them.
        totals = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
        args = (torch.zeros_like(z), totals, None, None, 0.0, *[None] * 4, False)
        y, _ = native.normalize(*args, z, activation, SLOPE)
        assert torch.equal(y.nan_to_num(3.5), activate(z, activation, SLOPE).nan_to_num(3.5))
        if activation == "relu6":
            # There torch's own derivative at NaN is one or zero by dtype and place.
            z = z.nan_to_num(3.5)
        for grad in (torch.full_like(z, 2.0), torch.full_like(z, math.inf)):
            stats = torch.ones(2, 1, dtype=reference.accumulate_dtype(dtype))
            _, inner = native.activation_backward_reduce(
                grad, z, stats, None, None, z, activation, SLOPE, True
            )
            expected = activation_backward(grad, z, activation, SLOPE)
            assert torch.equal(inner.nan_to_num(3.5), expected.nan_to_num(3.5))

    def test_bfloat16_is_rounded_as_torch_rounds_it(self) -> None:
        """Ties, their neighbors, denormals and overflow, each of them the bias of a channel."""
        halves = torch.arange(-(1 << 15), 1 << 15, 5, dtype=torch.int32) << 16
        bits = torch.cat([halves + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
        bias = bits.view(torch.float32)
        x = torch.zeros(1, bias.numel(), 1, dtype=torch.bfloat16)
        totals = torch.ones(2 * bias.numel() + 1, dtype=torch.float64)
        totals[1 : bias.numel() + 1] = 0
        y, _ = native.normalize(x, totals, None, bias, 0.0, *[None] * 4)
        expected = bias.bfloat16().view(-1)
        assert torch.equal(y.view(-1).isnan(), expected.isnan())
        assert torch.equal(y.view(-1).nan_to_num(3.5), expected.nan_to_num(3.5))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_threads_do_not_change_results(
        self, layout: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(native, "_VALUES_PER_THREAD", 1)
        t = case((4, 130, 40, 40), layout, torch.float32, CPU)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            totals = native.moments(t["x"])
            y, stats = native.normalize(t["x"], totals, t["weight"], None, EPS, *[None] * 4)
            sums = native.normalize_backward_reduce(t["grad"], t["x"], stats)
            dx = native.normalize_backward(t["grad"], t["x"], stats, totals, t["weight"], sums)
            results.append([totals, y, stats, sums, dx])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
class TestRunningStatistics:
    """They move as ``track`` moves them, which has tests of its own against torch."""

    @pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
    @pytest.mark.parametrize("tracked", [False, True], ids=["no counter", "counter"])
    @pytest.mark.parametrize("skip", [False, True], ids=["any", "skip_nonfinite"])
    @pytest.mark.parametrize("bad", [False, True], ids=["finite", "nan"])
    @pytest.mark.parametrize("held", [torch.float32, torch.bfloat16], ids=str)
    def test_every_combination(
        self, momentum: float | None, tracked: bool, skip: bool, bad: bool, held: torch.dtype
    ) -> None:
        t = case((3, 4, 5), "contiguous", torch.float32, CPU)
        x, totals = t["x"], t["totals"]
        if bad:
            totals[2] = math.nan

        def fresh() -> list[Tensor | None]:
            counter = torch.tensor(3) if tracked else None
            return [torch.full((4,), 0.5).to(held), torch.full((4,), 2.0).to(held), counter]

        ours, expected = fresh(), fresh()
        versions = [tensor._version for tensor in ours if tensor is not None]
        native.normalize(x, totals, None, None, EPS, *ours, momentum, skip)
        table = statistics_table(totals, EPS, torch.float32, known_nonempty=True)
        mean, var, counter = expected
        track(table, totals, (mean, var, counter, momentum, skip), known_nonempty=True)
        for mine, its in zip(ours, expected, strict=True):
            if mine is not None and its is not None:
                # One rounding of either, of which bfloat16 may make one of its own.
                unit = torch.finfo(held).eps if mine.is_floating_point() else 0.0
                torch.testing.assert_close(mine, its, rtol=2 * unit, atol=0, equal_nan=True)
        # As every write in place, so that autograd notices.
        changed = [tensor._version for tensor in ours if tensor is not None]
        assert all(a < b for a, b in zip(versions, changed, strict=True))

    def test_a_group_without_values_moves_nothing(self) -> None:
        x = torch.randn(2, 3)
        running = [torch.ones(3), torch.ones(3), torch.tensor(3)]
        native.normalize(x, torch.zeros(7, dtype=torch.float64), None, None, EPS, *running, 0.1)
        assert [tensor.tolist() for tensor in running] == [[1, 1, 1], [1, 1, 1], 3]


def _declined() -> dict[str, tuple[Any, ...]]:
    """Calls that the kernels leave to others: a function and its arguments."""
    t = case((2, 3, 4, 5), "contiguous", torch.float32, CPU)
    x, grad, stats, totals, sums = (t[k] for k in ("x", "grad", "stats", "totals", "sums"))
    last = grad.contiguous(memory_format=torch.channels_last)
    running = (None, None, None, 0.1, False)
    end = (x, stats, totals)
    return {
        "float16": (native.moments, x.half()),
        "empty": (native.moments, x[:0]),
        "not dense": (native.moments, x[:, :, ::2]),
        "totals of another size": (native.normalize, x, totals[1:], None, None, EPS, *running),
        "weight of another size": (
            native.normalize, x, totals, torch.ones(2), None, EPS, *running,
        ),
        "weight of more precision": (
            native.normalize, x, totals, torch.ones(3).double(), None, EPS, *running,
        ),
        "counter of floats": (
            native.normalize, x, totals, None, None, EPS, None, None, torch.tensor(0.0), 0.1,
        ),
        "residual laid out otherwise": (
            native.normalize, x, totals, None, None, EPS, *running, last,
        ),
        "activation": (native.normalize, x, totals, None, None, EPS, *running, None, "silu"),
        "gradient laid out otherwise": (native.normalize_backward_reduce, last, x, stats),
        "gradient of another dtype": (native.normalize_backward_reduce, grad.double(), x, stats),
        "statistics of another dtype": (native.normalize_backward_reduce, grad, x, stats.double()),
        "sums of another size": (native.normalize_backward, grad, *end, None, sums[1:]),
        "activation backward": (
            native.normalize_backward, grad, *end, None, sums, None, grad, "relu",
        ),
        "nothing kept": (
            native.activation_backward_reduce, grad, x, stats, None, None, None, "relu", 0.0, True,
        ),
        "nothing written": (
            native.activation_backward_reduce, grad, x, stats, None, None, x, "relu", 0.0, False,
        ),
    }  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", _declined())
def test_what_the_kernels_do_not_take_they_leave_alone(name: str) -> None:
    function, *args = _declined()[name]
    assert function(*args) is None


@needs_library
def test_other_activations_go_to_aten() -> None:
    t = case((2, 3, 4, 5), "contiguous", torch.float32, CPU)
    args = (t["x"], t["totals"], None, None, EPS, None, None, None, 0.1, False, t["residual"])
    for activation in ACTIVATIONS:
        both = [kernels.normalize(*args, activation, SLOPE)[0] for kernels in (cpu, aten)]
        torch.testing.assert_close(both[0], both[1])


@needs_library
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_ranks_hold_the_same_bits_whatever_their_tensors_look_like(
    held: torch.dtype, momentum: float | None
) -> None:
    """Some go through C alone, some through ATen, which takes the statistics from C if it can."""
    t = case((4, 3, 5, 6), "contiguous", torch.float32, CPU, offset=3.0)
    x, totals = t["x"], t["totals"]
    results = []
    for mine, activation in (
        (x, "identity"),
        (x, "silu"),
        (laid_out(x, "channels-last"), "identity"),
        (x.half(), "identity"),
        (x.bfloat16(), "relu"),
        (x[:0], "identity"),
    ):
        running = [torch.linspace(0.3, 1.7, 3).to(held) for _ in range(2)]
        running.append(torch.tensor(6))
        end = (momentum, False, None, activation, 0.0)
        cpu.normalize(mine, totals, None, None, EPS, *running, *end)
        results.append(running)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Doubled(Tensor):
    """A subclass that stands for twice what it holds, at no address."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Doubled":
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [2 * arg.held if isinstance(arg, Doubled) else arg for arg in args]
        return func(*args, **(kwargs or {}))


@needs_library
class TestArgumentsThatAreNoMemory:
    """Values that do not lie at the address of their tensor, in the op, which may skip dispatch."""

    @pytest.fixture(params=["alone", "in a group of one"])
    def group(self, request: pytest.FixtureRequest) -> Iterator[str]:
        """Sites that share and sites that do not, of a size for which both are in C."""
        if request.param == "alone":
            yield ""
            return
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
        yield torch.distributed.group.WORLD.group_name  # pyright: ignore
        torch.distributed.destroy_process_group()

    def test_a_subclass(self, group: str) -> None:
        t = case((4, 8, 64, 64), "contiguous", torch.float32, CPU)
        for place in (1, 2):
            args: list[Any] = [t["x"], t["weight"], t["bias"]]
            expected = [*args]
            args[place] = Doubled(args[place])
            expected[place] = 2 * expected[place]
            ys = [
                BATCH_NORM(*some, None, None, None, True, True, 0.1, EPS, group)
                for some in (args, expected)
            ]
            torch.testing.assert_close(*ys)

    @pytest.mark.parametrize("name", ["x", "weight", "bias", "grad"])
    def test_a_negative_view(self, group: str, name: str) -> None:
        """One at a time: of two, the signs could make up for each other."""
        t = case((4, 8, 64, 64), "contiguous", torch.float32, CPU)
        results = []
        for negate in (torch._neg_view, torch.neg):
            args = {**t, name: negate(t[name])}
            x = args["x"].requires_grad_()
            end = (*[None] * 3, True, True, 0.1, EPS, group)
            y = BATCH_NORM(x, args["weight"], args["bias"], *end)
            results.append([y, *torch.autograd.grad(y, x, args["grad"])])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    def test_freed_memory_is_an_error(self, group: str) -> None:
        t = case((4, 8, 64, 64), "contiguous", torch.float32, CPU)
        flat = torch.ones(16)
        weight = flat[8:]
        flat.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            BATCH_NORM(t["x"], weight, None, None, None, None, True, True, 0.1, EPS, group)

    def test_a_profiler_sees_every_phase(self, group: str) -> None:
        t = case((4, 8, 64, 64), "contiguous", torch.float32, CPU)
        x, end = t["x"].requires_grad_(), (*[None] * 3, True, True, 0.1, EPS, group)
        with torch.profiler.profile(acc_events=True) as profile:
            BATCH_NORM(x, t["weight"], t["bias"], *end).backward(t["grad"])
        local = {"batch_norm_local", "batch_norm_local_backward"}
        phases = {"moments", "normalize", "normalize_backward_reduce", "normalize_backward"}
        seen = {event.key for event in profile.key_averages()}
        assert {f"bnrewrite::{name}" for name in (phases if group else local)} <= seen

    def test_a_function_mode_sees_a_site(self) -> None:
        seen = []

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        model = bnrewrite.convert(torch.nn.BatchNorm1d(3))
        with Watch():
            model(torch.randn(4, 3))
        assert BATCH_NORM in seen

    def test_batched_gradients(self) -> None:
        t = case((4, 8, 64, 64), "contiguous", torch.float32, CPU)
        x = t["x"].requires_grad_()
        y = BATCH_NORM(x, t["weight"], t["bias"], None, None, None, True, True, 0.1, EPS, "")
        grads = torch.stack([t["grad"], 2 * t["grad"]])
        (both,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
        for one, grad in zip(both, grads, strict=True):
            (alone,) = torch.autograd.grad(y, x, grad, retain_graph=True)
            torch.testing.assert_close(one, alone)


@needs_library
@pytest.mark.parametrize("shape", [(2, 70000), (40, 5000), (3, 2049, 5, 7)], ids=str)
def test_many_channels(shape: tuple[int, ...]) -> None:
    """Blocks of channels, of which the last is not whole."""
    t = case(shape, "channels-last", torch.float32, CPU)
    check_moments(native.moments(t["x"]), t["x"])
    sums = native.normalize_backward_reduce(t["grad"], t["x"], t["stats"])
    rstd = t["stats"][1].max().item()
    torch.testing.assert_close(sums, t["sums"], rtol=1e-5, atol=1e-5 * (1 + rstd))


class TestWithoutTheLibrary:
    """The package works without a compiler, or when told to leave these kernels out."""

    @pytest.fixture(autouse=True)
    def _forget(self) -> Iterator[None]:
        load._loaded.cache_clear()
        yield
        load._loaded.cache_clear()

    def test_a_setting_leaves_the_kernels_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BNREWRITE_KERNELS", "aten")
        x = torch.randn(2, 3, 4)
        assert native.library() is None
        assert "BNREWRITE_KERNELS" in load.whence()
        assert native.moments(x) is None
        assert torch.equal(cpu.moments(x), aten.moments(x))

    def test_a_setting_that_is_none(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("BNREWRITE_KERNELS", "fast")
        assert cli.main(["env"]) == 2
        error = capsys.readouterr().err
        assert "BNREWRITE_KERNELS must be 'auto' or 'aten', but it is 'fast'." in error
        assert len(error.splitlines()) == 1

    @needs_library
    def test_a_library_of_other_sources_is_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(load, "_ABI", -1)
        assert native.library() is None
        assert "of another version" in load.whence()

    @needs_library
    def test_a_library_older_than_its_sources_is_not_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        built = importlib.util.find_spec("bnrewrite.kernels.native._library")
        assert built is not None
        assert built.origin is not None
        copy = tmp_path / Path(built.origin).name
        shutil.copy(built.origin, copy)
        (tmp_path / "native.c").write_text("")
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: mock.Mock(origin=str(copy)))
        os.utime(copy, (1, 1))
        with pytest.warns(UserWarning, match=r"older than its sources .* reinstall bnrewrite"):
            assert native.library() is None
        os.utime(tmp_path / "native.c", (0, 0))
        load._loaded.cache_clear()
        assert native.library() is not None

    def test_a_file_that_is_no_library_is_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: find_spec("bnrewrite"))
        assert native.library() is None
