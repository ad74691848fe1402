"""The Triton kernels against the reference in float64, and in the ops, in the interpreter."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from bnrewrite import reference as definition
from bnrewrite import two_branches as definition_of_two
from bnrewrite.activations import ACTIVATIONS, activate
from bnrewrite.kernels import gpu as gpu_kernels
from bnrewrite.kernels import gpu_two_branches as gpu_kernels_of_two
from bnrewrite.kernels.statistics import gradients_of, leave_gradients, statistics_table, track
from bnrewrite.kernels.triton import plan as plans
from bnrewrite.kernels.triton.plan import Plan, plan
from bnrewrite.ops import batch_norm_act as batch_norm_act_module
from bnrewrite.ops import sites
from bnrewrite.ops.library import KERNELS, LIBRARY
from bnrewrite.ops.moments import MOMENTS
from bnrewrite.ops.normalize_sites import normalize_sites
from tests import interpreter as harness
from tests.interpreter import Interpreter, kernels_on_cpu_tensors
from tests.kernel_cases import EPS, case, check_close, check_moments, laid_out

# Without types: cases pass arguments on in groups.
gpu: Any = gpu_kernels
gpu_of_two: Any = gpu_kernels_of_two
reference: Any = definition
two_branches: Any = definition_of_two
batch_norm_act: Any = batch_norm_act_module
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = ["contiguous", "channels-last"]
SHAPES = [
    (5, 3),
    (1, 2, 1, 2),
    (1, 1, 3, 1),
    (2, 3, 7),
    (3, 7, 7, 9),
    (7, 63, 1, 1),
    (2, 5, 3, 4, 5),
    (3, 4, 52, 48),
    (2, 65, 17, 3),
    (2, 70, 17, 3),
    (5, 24, 7, 7),
    (36, 20, 2, 5),
]
"""Odd sizes: masks everywhere, accesses of one to eight values, one program and many, tiles of
several images."""

MANY = [
    (9, 4, 52, 48),
    (131, 8, 7, 7),
    (44, 20, 2, 5),
    (70, 24, 3, 3),
    (21, 3, 25, 8),
    (3, 37, 24, 16),
]
"""With :data:`FEW` multiprocessors: programs with many tiles, small images in groups, folded rows,
those of the last one in several blocks."""

FEW = 2
SLOPE = 0.25
PHASES = (
    "moments",
    "normalize",
    "normalize_keep_sum",
    "normalize_two",
    "normalize_backward_reduce",
    "activation_backward_reduce",
    "normalize_backward",
    "normalize_two_backward_reduce",
    "normalize_two_backward",
)

run = pytest.fixture(scope="module", name="run")(harness.fixture)


def _check_moments(shape: tuple[int, ...], layout: str, dtype: torch.dtype, offset: float) -> None:
    x = case(shape, layout, dtype, harness.device(), offset=offset)["x"]
    with kernels_on_cpu_tensors():
        packed = gpu.moments(x)
    check_moments(packed, x)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("reads", [1, 2, 3])
def test_the_shapes_are_cut_in_every_way(itemsize: int, reads: int) -> None:
    ways = set()
    cases = [(shape, 132) for shape in SHAPES] + [(shape, FEW) for shape in MANY]
    for ((N, C, *rest), multiprocessors), last in itertools.product(cases, (False, True)):
        cut = plan(N, C, math.prod(rest), itemsize, last, reads, multiprocessors)
        assert cut is not None
        layout = "channels-last" if last else "group" if cut.tile.GROUP else "contiguous"
        layout = "folded" if cut.tile.FOLD else layout
        each = "one tile" if cut.num_tiles == cut.num_splits else "several"
        programs = "shared" if cut.num_splits > 1 else "alone"
        ways.add((layout, programs, each))
        if cut.tile.BLOCK_S > cut.tile.SPAN:
            ways.add(("several images", programs, each))
    layouts = ("channels-last", "folded", "group", "contiguous")
    assert ways >= set(itertools.product(layouts, ["shared"], ["several"]))
    assert ways >= set(itertools.product(["channels-last", "contiguous"], ["alone"], ["several"]))
    assert ways >= {
        ("channels-last", "shared", "one tile"),
        ("several images", "alone", "one tile"),
    }


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_rows_that_start_unevenly_are_folded(itemsize: int) -> None:
    """So that each access has 16 bytes; by reductions, where it would have 2 or 4 at most."""
    for C, reads in itertools.product([3, 18, 58, 64, 127, 270], range(4)):
        cut = plan(8, C, 256 * 256, itemsize, True, reads)
        assert cut is not None
        access = math.gcd(C * itemsize, 16)
        is_odd = access == itemsize
        is_folded = is_odd or (access < 16 and (reads == 0 or (C == 18 and access == 4)))
        assert is_folded == cut.tile.FOLD
        assert cut.tile.VEC * itemsize == (16 if is_folded else access)


@pytest.mark.parametrize("last", [False, True])
def test_one_channel_is_one_image(last: bool) -> None:
    for reads in range(4):
        cut = plan(64, 1, 112 * 112, 2, last, reads)
        assert cut is not None
        assert (cut.tile.N, cut.tile.S) == (1, 64 * 112 * 112)
        assert cut.tile.BLOCK_S >= 2048


@pytest.mark.parametrize(("C", "num_rows"), [(65, 51), (3, 1), (5, 2), (65, 1023), (5, 4098)])
@pytest.mark.parametrize("reads", range(4))
def test_rows_are_folded_evenly_and_only_where_a_channel_is_shared(
    C: int, num_rows: int, reads: int
) -> None:
    cut = plan(1, C, num_rows, 4, True, reads)
    assert cut is not None
    assert num_rows % cut.tile.P == 0
    assert (num_rows % 2 == 0 and (reads == 0 or num_rows > 2)) == cut.tile.FOLD


def _on_a_small_device(check: Callable[..., None], *args: Any) -> None:
    """``check(*args)`` where programs are few, so that each has many tiles."""
    plans._plan_of.cache_clear()
    try:
        with mock.patch.object(plans, "_multiprocessors", return_value=FEW):
            check(*args)
    finally:
        plans._plan_of.cache_clear()


class TestMoments:
    """Statistics of any layout, with as many digits as their precision has."""

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_every_shape_layout_and_dtype(
        self, run: Interpreter, shape: tuple[int, ...], layout: str, dtype: torch.dtype
    ) -> None:
        run(_check_moments, shape, layout, dtype, 1.0)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_a_mean_of_ten_thousand_deviations(
        self, run: Interpreter, layout: str, dtype: torch.dtype
    ) -> None:
        run(_check_moments, (3, 4, 52, 48), layout, dtype, 2e4)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_first_tile_unlike_the_others(self, run: Interpreter, layout: str) -> None:
        run(_check_drift, layout)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_bad_value_spoils_its_channel_and_no_other(
        self, run: Interpreter, value: float, layout: str
    ) -> None:
        run(_check_bad_value, value, layout)


def _check_drift(layout: str) -> None:
    """The mean jumps by a thousand deviations after the first of many tiles."""
    x = torch.randn(1, 2, 90, 90, device=harness.device())
    x[:, :, 12:] += 1000
    x = laid_out(x, layout)
    with kernels_on_cpu_tensors():
        _, mean, var = reference.finalize(gpu.moments(x))
    values = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean, values.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var, values.var(1, correction=0), rtol=1e-5, atol=0)


def _check_bad_value(value: float, layout: str) -> None:
    t = case((3, 4, 13, 11), layout, torch.float32, harness.device())
    x = t["x"]
    with kernels_on_cpu_tensors():
        clean, _ = gpu.normalize(x, gpu.moments(x), None, None, EPS, *[None] * 4)
        x[1, 1, 2, 3] = value
        y, _ = gpu.normalize(x, gpu.moments(x), None, None, EPS, *[None] * 4)
        sums = gpu.normalize_backward_reduce(t["grad"], x, t["stats"])
    assert y[:, 1].isnan().all()
    torch.testing.assert_close(y[:, ::2], clean[:, ::2], rtol=0, atol=0)
    assert torch.equal(sums.isfinite(), torch.tensor([1, 1, 1, 1, 1, 0, 1, 1]).bool().to(x.device))


def _check_forward(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    t = case(shape, layout, dtype, harness.device())
    residual = t["residual"] if options.get("residual") else None
    weight, bias = (t[name] if name in options["affine"] else None for name in ("weight", "bias"))
    activation = options.get("activation", "identity")
    with kernels_on_cpu_tensors():
        y, stats = gpu.normalize(
            t["x"], t["totals"], weight, bias, EPS, *[None] * 4, False, residual, activation, SLOPE
        )
        if residual is not None:
            same, same_stats, total = gpu.normalize_keep_sum(
                t["x"], t["totals"], weight, bias, EPS, *[None] * 4, False, residual, activation,
                SLOPE,
            )  # fmt: skip
            assert torch.equal(same, y)
            assert torch.equal(same_stats, stats)
            assert total.stride() == y.stride()
            exact, _ = reference.normalize(
                t["x"].double(), t["totals"], weight, bias, EPS, residual
            )
            check_close(total, exact, "what is activated")
    # On the CPU: on a GPU the factor 1/6 of ATen's hardswish is one of float32.
    arguments = (t["x"].double(), t["totals"], weight, bias, EPS, residual, activation, SLOPE)
    exact, exact_stats = (
        value.to(y.device)
        for value in reference.normalize(
            *[value.cpu() if isinstance(value, Tensor) else value for value in arguments]
        )
    )
    assert y.dtype == dtype
    assert y.stride() == t["x"].stride()
    assert stats.dtype == t["stats"].dtype
    check_close(y, exact, "y")
    check_close(stats, exact_stats, "stats")


def _check_running(shape: tuple[int, ...], dtype: torch.dtype, momentum: float | None) -> None:
    t = case(shape, "contiguous", torch.float32, harness.device())
    C = shape[1]
    device = harness.device()
    running: list[Tensor] = [
        torch.randn(C, device=device).to(dtype),
        (torch.rand(C, device=device) + 0.5).to(dtype),
        torch.tensor(3, device=device),
    ]
    expected = [running[0].double(), running[1].double(), running[2].clone()]
    table = statistics_table(t["totals"], EPS, torch.float64, known_nonempty=False)
    as_running: Any = (*expected, momentum, False)
    track(table, t["totals"], as_running, known_nonempty=False)
    with kernels_on_cpu_tensors():
        gpu.normalize(t["x"], t["totals"], None, None, EPS, *running, momentum)
    unit = torch.finfo(dtype).eps
    for mine, its in zip(running[:2], expected[:2], strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), its, rtol=unit, atol=unit)
    assert running[2].item() == expected[2].item()


def _check_nobody_holds_a_value(momentum: float | None) -> None:
    """A rank whose batch is empty; first others hold values, then nobody does."""
    device = harness.device()
    x = torch.empty(0, 3, 4, device=device)
    totals = reference.moments(torch.randn(5, 3, 4, device=device))
    for count, packed in ((1, totals), (1, torch.zeros_like(totals))):
        running = [torch.zeros(3, device=device), torch.ones(3, device=device)]
        tracked = torch.tensor(0, device=device)
        with kernels_on_cpu_tensors():
            y, stats = gpu.normalize(x, packed, None, None, EPS, *running, tracked, momentum)
            assert torch.equal(gpu.moments(x), torch.zeros_like(totals))
        assert y.shape == x.shape
        changes = packed is totals
        assert tracked.item() == (count if changes else 0)
        assert (not torch.equal(running[0], torch.zeros_like(running[0]))) == changes
        check_close(stats, reference.statistics(packed, EPS, torch.float64), "stats")


class TestNormalize:
    """y, stats and running statistics."""

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_every_shape_layout_and_dtype(
        self, run: Interpreter, shape: tuple[int, ...], layout: str, dtype: torch.dtype
    ) -> None:
        options = {"affine": ("weight", "bias"), "residual": True, "activation": "relu"}
        run(_check_forward, shape, layout, dtype, options)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    def test_every_activation(
        self, run: Interpreter, activation: str, residual: bool, dtype: torch.dtype
    ) -> None:
        options = {"affine": ("weight", "bias"), "residual": residual, "activation": activation}
        run(_check_forward, (3, 7, 7, 9), "contiguous", dtype, options)

    @pytest.mark.parametrize("affine", [("weight",), ("bias",), ()], ids=str)
    def test_without_weight_or_bias(self, run: Interpreter, affine: tuple[str, ...]) -> None:
        run(_check_forward, (3, 7, 7, 9), "contiguous", torch.float32, {"affine": affine})

    @pytest.mark.parametrize("momentum", [0.25, None])
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("shape", [(4, 3, 5), (2, 1100)], ids=str)
    def test_running_statistics_of_any_precision(
        self, run: Interpreter, shape: tuple[int, ...], dtype: torch.dtype, momentum: float | None
    ) -> None:
        run(_check_running, shape, dtype, momentum)

    @pytest.mark.parametrize("momentum", [0.25, None])
    def test_empty_batches(self, run: Interpreter, momentum: float | None) -> None:
        run(_check_nobody_holds_a_value, momentum)


def _check_strided_per_channel() -> None:
    """Every other value of longer vectors, as weight, bias and running statistics."""
    t = case((4, 6, 5), "contiguous", torch.float32, harness.device())
    table = torch.rand(6, 8, device=harness.device()) + 0.5
    before = table.clone()
    strided = table.unbind(1)
    dense = [one.clone() for one in strided]
    results = []
    with kernels_on_cpu_tensors():
        for weight, bias, mean, var, *_ in (strided, dense):
            tracked = torch.tensor(3, device=table.device)
            moved = (mean, var, tracked, 0.25, False)
            y, stats = gpu.normalize(t["x"], t["totals"], weight, bias, EPS, *moved, None, "relu")
            behind = (weight, bias, None, "relu", 0.0)
            sums, inner = gpu.activation_backward_reduce(t["grad"], t["x"], stats, *behind, True)
            dx = gpu.normalize_backward(
                t["grad"], t["x"], stats, t["totals"], weight, sums, bias, None, "relu"
            )
            results.append([y, stats, sums, inner, dx, mean, var, tracked])
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its)
    assert torch.equal(table[:, :2], before[:, :2])
    assert torch.equal(table[:, 4:], before[:, 4:])


class TestLeftGradients:
    """What the reduction wrote besides the sums serves where nobody needs to see what follows."""

    def test_whoever_looks_sees_the_sums(self) -> None:
        sums = torch.randn(6, dtype=torch.float64)
        left = torch.zeros(6)
        leave_gradients(sums, left)
        assert gradients_of(sums, torch.float32) is left
        assert torch.equal(gradients_of(sums, torch.float64), sums)
        # A tracer of ops on real tensors.
        traced = make_fx(lambda x: gradients_of(x, torch.float32) * 1)(sums)
        assert torch.equal(traced(2 * sums), (2 * sums).float())
        sums.requires_grad_()
        assert torch.equal(gradients_of(sums, torch.float32), sums.float())


class TestPerChannel:
    """Vectors of one value per channel, however they lie in memory."""

    def test_strides(self, run: Interpreter) -> None:
        run(_check_strided_per_channel)


def _check_two(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Against the reference for y, and against two normalizations for all that moves."""
    first, second = (
        case(shape, layout, dtype, harness.device(), offset=offset) for offset in (1.0, -2.0)
    )
    acc = reference.accumulate_dtype(dtype)
    affine = ("weight", "bias")
    ones, running = [], []
    momenta = options.get("momenta", (0.25, 0.5))
    for t, eps, momentum in zip((first, second), (EPS, 2 * EPS), momenta, strict=True):
        values = options.get("affine", affine)
        per_channel = (t[name] if name in values else None for name in affine)
        mine = [t["weight"].clone(), t["weight"].abs(), torch.tensor(3, device=t["x"].device)]
        running.append(mine)
        skips = options.get("skips", False)
        ones.append([t["x"], t["totals"], *per_channel, eps, *mine, momentum, skips])
    act = (options.get("activation", "relu"), SLOPE)
    copies = [[value.clone() for value in moved] for moved in running]
    with kernels_on_cpu_tensors():
        y, stats, other_stats = gpu_of_two.normalize_two(*ones[0], *ones[1], *act)
        for one, copied in zip(ones, copies, strict=True):
            _, alone = gpu.normalize(*one[:5], *copied, *one[8:])
            assert torch.equal(alone, stats if one is ones[1] else other_stats)
    exact, *_ = two_branches.normalize_two(
        ones[0][0].double(), *ones[0][1:5], ones[1][0].double(), *ones[1][1:5], *act
    )
    assert y.dtype == dtype
    assert stats.dtype == other_stats.dtype == acc
    assert y.stride() == second["x"].stride()
    check_close(y, exact, "y", terms=4.0)
    for mine, its in zip(running, copies, strict=True):
        for a, b in zip(mine, its, strict=True):
            assert torch.equal(a, b)


def _check_two_empty() -> None:
    """A rank whose batch is empty moves what the others move."""
    x = torch.empty(0, 3, 4, device=harness.device())
    totals = reference.moments(torch.randn(5, 3, 4, device=x.device))
    ones, running = [], []
    for _ in range(2):
        mine = [torch.zeros(3), torch.ones(3), torch.tensor(0)]
        running.append([one.to(x.device) for one in mine])
        ones.append([x, totals, None, None, EPS, *running[-1], 0.5, False])
    with kernels_on_cpu_tensors():
        y, *_ = gpu_of_two.normalize_two(*ones[0], *ones[1], "relu", 0.0)
    assert y.shape == x.shape
    for mean, _, tracked in running:
        assert tracked.item() == 1
        assert mean.abs().min() > 0


class TestNormalizeTwo:
    """The residual is normalized on the way, and both running statistics move."""

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_every_shape_layout_and_dtype(
        self, run: Interpreter, shape: tuple[int, ...], layout: str, dtype: torch.dtype
    ) -> None:
        run(_check_two, shape, layout, dtype, {})

    @pytest.mark.parametrize(
        "options",
        [
            {"affine": ("weight",)},
            {"affine": ("bias",)},
            {"affine": (), "activation": "identity"},
            {"momenta": (None, 0.5)},
            {"momenta": (0.25, None)},
            {"momenta": (None, None)},
            {"skips": True},
            {"activation": "leaky_relu"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(3, 7, 7, 9), (2, 1100)], ids=str)
    def test_options(
        self, run: Interpreter, shape: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        run(_check_two, shape, "contiguous", torch.float32, options)

    def test_empty_batches(self, run: Interpreter) -> None:
        run(_check_two_empty)

    def test_another_layout(self, run: Interpreter) -> None:
        run(_check_two_layouts)


def _check_two_layouts() -> None:
    x, other = (torch.randn(2, 3, 4, 8, device=harness.device()) for _ in range(2))
    totals, other_totals = reference.moments(x), reference.moments(other)
    mixed = laid_out(other, "channels-last")
    nothing = [None] * 4
    with kernels_on_cpu_tensors():
        ys = [
            gpu_of_two.normalize_two(
                one, other_totals, None, None, EPS, *nothing, False,
                x, totals, None, None, EPS, *nothing, False, "relu", 0.0,
            )[0]
            for one in (other, mixed)
        ]  # fmt: skip
    assert torch.equal(ys[0], ys[1])


def _check_backward(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    t = case(shape, layout, dtype, harness.device())
    activation = options.get("activation", "identity")
    affine = [t[name] if name in options["affine"] else None for name in ("weight", "bias")]
    act = (activation, SLOPE)
    kept = None
    if options.get("residual"):
        # What was activated, or the result.
        known = ("relu", 0.0) if activation == "relu" else ("identity", 0.0)
        kept = reference.normalize(t["x"], t["totals"], *affine, EPS, t["residual"], *known)[0]
    wide: Any = [
        None if v is None else v.double() for v in (t["grad"], t["x"], t["stats"], *affine)
    ]
    exact, exact_inner = reference.activation_backward_reduce(*wide, kept, *act, True)
    exact_dx = reference.normalize_backward(
        *wide[:3], t["totals"], wide[3], exact, wide[4], kept, *act
    )
    with kernels_on_cpu_tensors():
        sums, inner = gpu.activation_backward_reduce(
            t["grad"], t["x"], t["stats"], *affine, kept, *act, True
        )
        same, nothing = gpu.activation_backward_reduce(
            t["grad"], t["x"], t["stats"], *affine, kept, *act, False
        )
        dx = gpu.normalize_backward(
            t["grad"], t["x"], t["stats"], t["totals"], affine[0], exact, affine[1], kept, *act
        )
        dx_of_inner = gpu.normalize_backward(
            inner, t["x"], t["stats"], t["totals"], affine[0], exact
        )
        if activation == "identity":
            plain = gpu.normalize_backward_reduce(t["grad"], t["x"], t["stats"])
            assert torch.equal(plain, sums)
    assert torch.equal(same, sums)
    assert nothing.numel() == 0
    assert inner.dtype == dx.dtype == dtype
    assert inner.stride() == dx.stride() == t["x"].stride()
    check_close(inner, exact_inner, "gradient of the residual")
    # A sum of M terms of order one, each rounded to float32 before it is added.
    terms = (t["x"].numel() / shape[1]) ** 0.5
    unit = torch.finfo(reference.accumulate_dtype(dtype)).eps
    assert (sums - exact).abs().max().item() <= 16 * terms * unit
    # rstd is up to 1 / sqrt(eps) where the values of a channel are nearly equal.
    terms = t["stats"][1].max().item() * 4 + 1
    check_close(dx, exact_dx, "dx", terms=terms)
    # inner is rounded to its dtype before it is scaled.
    unit = torch.finfo(dtype).eps
    difference = (dx_of_inner.double() - exact_dx).abs().max().item()
    scale = max(exact_dx.abs().max().item(), exact_inner.abs().max().item() * terms, 1.0)
    assert difference <= 16 * scale * unit


class TestBackward:
    """Sums, the gradient of the residual, and the input gradient."""

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_every_shape_layout_and_dtype(
        self, run: Interpreter, shape: tuple[int, ...], layout: str, dtype: torch.dtype
    ) -> None:
        options = {"affine": ("weight", "bias"), "residual": True, "activation": "relu"}
        run(_check_backward, shape, layout, dtype, options)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    def test_every_activation(
        self, run: Interpreter, activation: str, residual: bool, dtype: torch.dtype
    ) -> None:
        options = {"affine": ("weight", "bias"), "residual": residual, "activation": activation}
        run(_check_backward, (3, 7, 7, 9), "contiguous", dtype, options)

    @pytest.mark.parametrize("affine", [("weight",), ("bias",), ()], ids=str)
    def test_without_weight_or_bias(self, run: Interpreter, affine: tuple[str, ...]) -> None:
        options = {"affine": affine, "activation": "silu"}
        run(_check_backward, (3, 7, 7, 9), "channels-last", torch.float32, options)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_values_that_are_never_read(self, run: Interpreter, activation: str) -> None:
        run(_check_unread, activation)

    def test_a_gradient_of_another_layout_and_unaligned_memory(self, run: Interpreter) -> None:
        run(_check_strides)


def _check_unread(activation: str) -> None:
    """Behind the end of a row stands a zero, which is far from channels of one large value."""
    x = torch.full((3, 7, 7, 9), 1e13, device=harness.device())
    grad = torch.randn_like(x)
    totals = reference.moments(x)
    stats = reference.statistics(totals, EPS, torch.float32)
    weight, bias = torch.ones(2, 7, device=x.device).unbind()
    with kernels_on_cpu_tensors():
        sums, _ = gpu.activation_backward_reduce(
            grad, x, stats, weight, bias, None, activation, SLOPE, False
        )
    assert sums.isfinite().all()


def _check_strides() -> None:
    device = harness.device()
    memory = torch.randn(2 * 3 * 4 * 8 + 1, device=device)
    x = memory[1:].view(2, 3, 4, 8)
    grad = laid_out(torch.randn(2, 3, 4, 8, device=device), "channels-last")
    with kernels_on_cpu_tensors():
        totals = gpu.moments(x)
        stats = reference.statistics(totals, EPS, torch.float32)
        sums = gpu.normalize_backward_reduce(grad, x, stats)
        dx = gpu.normalize_backward(grad, x, stats, totals, None, sums)
    leaf = x.double().requires_grad_()
    F.batch_norm(leaf, None, None, training=True, eps=EPS).backward(grad.double())
    assert leaf.grad is not None
    torch.testing.assert_close(dx.double(), leaf.grad, rtol=1e-5, atol=1e-5)
    assert dx.stride() == x.stride()


def _check_two_backward(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    first, second = (
        case(shape, layout, dtype, harness.device(), offset=offset) for offset in (1.0, -2.0)
    )
    act = (options.get("activation", "relu"), SLOPE)
    grad = second["grad"]
    affine = [
        (t["weight"], t["bias"]) if wanted else (None, None)
        for t, wanted in zip((first, second), options.get("affine", (True, True)), strict=True)
    ]
    if options.get("mixed"):
        first["x"] = laid_out(first["x"], "channels-last")
    ones = [[t["x"], t["stats"]] for t in (first, second)]
    wide = [[one.double() for one in pair] for pair in ones]
    wide_affine = [[None if v is None else v.double() for v in pair] for pair in affine]
    sums = two_branches.normalize_two_backward_reduce(
        grad.double(), *wide[0], *wide_affine[0], *wide[1], *wide_affine[1], *act
    )
    # Of two sites that differ in all that they are given.
    first["totals"] = 2 * first["totals"]
    exact = (3 * sums[0], sums[1])
    more = [
        (t["totals"], *pair, sums)
        for t, pair, sums in zip((first, second), affine, exact, strict=True)
    ]
    exact_dxs = two_branches.normalize_two_backward(
        grad.double(),
        *wide[0], first["totals"], *wide_affine[0], exact[0],
        *wide[1], second["totals"], *wide_affine[1], exact[1], *act,
    )  # fmt: skip
    with kernels_on_cpu_tensors():
        found = gpu_of_two.normalize_two_backward_reduce(
            grad, *ones[0], *affine[0], *ones[1], *affine[1], *act
        )
        dxs = gpu_of_two.normalize_two_backward(grad, *ones[0], *more[0], *ones[1], *more[1], *act)
    terms = (grad.numel() / shape[1]) ** 0.5
    unit = torch.finfo(reference.accumulate_dtype(dtype)).eps
    for mine, its in zip(found, sums, strict=True):
        assert mine.dtype == torch.float64
        assert (mine - its).abs().max().item() <= 16 * terms * unit
    assert torch.equal(found[0][: shape[1]], found[1][: shape[1]])
    for t, dx, its in zip((first, second), dxs, exact_dxs, strict=True):
        assert dx.dtype == dtype
        assert dx.stride() == t["x"].stride()
        check_close(dx, its, "dx", terms=t["stats"][1].max().item() * 4 + 1)


class TestTwoBackward:
    """The sums and the input gradients of two branches, each in one pass."""

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_every_shape_layout_and_dtype(
        self, run: Interpreter, shape: tuple[int, ...], layout: str, dtype: torch.dtype
    ) -> None:
        run(_check_two_backward, shape, layout, dtype, {})

    @pytest.mark.parametrize(
        "options",
        [
            *({"activation": activation} for activation in ACTIVATIONS),
            {"affine": (True, False)},
            {"affine": (False, True)},
            {"affine": (False, False), "activation": "identity"},
            {"mixed": True},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(3, 7, 7, 9), (3, 4, 52, 48)], ids=str)
    def test_options(
        self, run: Interpreter, shape: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        run(_check_two_backward, shape, "contiguous", torch.float32, options)

    @pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
    def test_derivatives_of_a_sum(self, run: Interpreter, activation: str) -> None:
        run(_check_sum, activation)


def _check_sum(activation: str) -> None:
    """Two sites that are added, on these kernels, derivatives of both orders, against torch's."""
    _register_kernels()
    args = [
        torch.randn(size, dtype=torch.float64, device=harness.device()).requires_grad_()
        for size in ((3, 2, 5), (3, 2, 5), 2, 2)
    ]
    a, b, weight, bias = args
    common = (None, None, None, True, True, 0.1, EPS)
    first, second = (sites.Site(x, weight, bias, *common) for x in (a, b))
    second = second._replace(residual_site=0, act=(activation, SLOPE))
    with (
        kernels_on_cpu_tensors(),
        mock.patch.object(sites, "prefers_recomputing", return_value=True),
    ):
        with torch.no_grad():
            totals = torch.cat([MOMENTS(a), MOMENTS(b)])
        ours = _derivatives(normalize_sites([first, second], [a, b], totals, "")[1], args)
    first_y, second_y = (F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS) for x in (a, b))
    expected = _derivatives(activate(first_y + second_y, activation, SLOPE), args)
    for mine, its in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


def _register_kernels() -> None:
    """Has CPU tensors take these kernels where there is no GPU."""
    if harness.device().type == "cpu":
        for name in PHASES:
            kernel = getattr(gpu_of_two if "_two" in name else gpu, name)
            LIBRARY.impl(name, kernel, "CPU", allow_override=True)
            KERNELS[id(getattr(torch.ops.bnrewrite, name).default)] = kernel, kernel


@contextlib.contextmanager
def _like_a_gpu() -> Iterator[None]:
    """After :func:`_register_kernels`: ops work as they do on a GPU."""
    with (
        kernels_on_cpu_tensors(),
        mock.patch.object(sites, "prefers_recomputing", return_value=True),
    ):
        yield


def _check_ops(activation: str, with_residual: bool) -> None:
    """The whole op on these kernels, derivatives of both orders, against torch's own."""
    _register_kernels()
    args = [
        torch.randn(size, dtype=torch.float64, device=harness.device()).requires_grad_()
        for size in ((3, 2, 5), 2, 2, (3, 2, 5))
    ]
    x, weight, bias, residual = args
    if not with_residual:
        args, residual = args[:3], None
    with _like_a_gpu():
        y = batch_norm_act.BATCH_NORM_ACT(
            x, weight, bias, None, None, None, True, True, 0.1, EPS, "", residual, activation, SLOPE
        )
        ours = _derivatives(y, args)
    z = F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)
    z = z if residual is None else z + residual
    expected = _derivatives(activate(z, activation, SLOPE), args)
    # On a GPU the factor 1/6 of ATen's hardswish is one of float32.
    is_rough = activation == "hardswish" and z.is_cuda
    tolerance = torch.finfo(torch.float32).eps if is_rough else 1e-9
    for mine, its in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance)


def _check_negative_view(name: str) -> None:
    _register_kernels()
    t = case((3, 4, 5), "contiguous", torch.float64, harness.device())
    end = (*[None] * 3, True, True, 0.1, EPS, "")
    results = []
    for negate in (torch._neg_view, torch.neg):
        args = {**t, name: negate(t[name])}
        x, residual = args["x"].requires_grad_(), args["residual"].requires_grad_()
        with _like_a_gpu():
            y = batch_norm_act.BATCH_NORM_ACT(
                x, args["weight"], args["bias"], *end, residual, "silu", SLOPE
            )
            results.append([y, *torch.autograd.grad(y, (x, residual), args["grad"])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def _derivatives(y: Tensor, args: list[Tensor]) -> list[Tensor]:
    """y, first derivatives without and with a graph, and second ones."""
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    grad.requires_grad_()
    plain = torch.autograd.grad(y, args, grad, retain_graph=True)
    first = torch.autograd.grad(y, args, grad, create_graph=True)
    total = torch.stack([(one * one).sum() for one in first]).sum()
    return [y, *plain, *first, *torch.autograd.grad(total, [*args, grad], materialize_grads=True)]


def _check_addresses(cut: Plan, C: int, t: int, block: int, least: int) -> None:
    from tests import tile_kernel

    kernel: Any = tile_kernel.addresses_kernel

    t %= cut.num_tiles
    block %= cut.num_blocks
    shape = (cut.tile.BLOCK_C, cut.tile.BLOCK_S)
    result = torch.empty(shape, dtype=torch.int64, device=harness.device())
    options = (
        cut.tile.BLOCK_C,
        cut.tile.BLOCK_S,
        cut.tile.SPAN,
        cut.tile.VEC,
        cut.tile.LAST,
        cut.tile.GROUP,
        cut.tile.FOLD,
    )
    kernel[(1,)](result, *cut.sizes, t, block, *options)
    n, part = divmod(t, -(-cut.tile.S // cut.tile.SPAN))
    width, num_columns = cut.tile.GROUP * cut.tile.P or cut.tile.BLOCK_C, cut.C * cut.tile.P
    column = torch.arange(cut.tile.BLOCK_C).unsqueeze(1)
    c = block * width + column
    n = n * (cut.tile.BLOCK_S // cut.tile.SPAN) + torch.arange(cut.tile.BLOCK_S) // cut.tile.SPAN
    s = part * cut.tile.SPAN + torch.arange(cut.tile.BLOCK_S) % cut.tile.SPAN
    expected = s * num_columns + c if cut.tile.LAST else (n * C + c) * cut.tile.S + s
    is_outside = (s >= cut.tile.S) | (n >= cut.tile.N) | (column >= width) | (c >= num_columns)
    expected[is_outside] = -1
    assert expected.max() > least
    assert torch.equal(result.cpu(), expected)


def _check_rstd(dtype: torch.dtype) -> None:
    sizes = [0.0, 1e-60, 1e-50, 1e-40, 1e-30, 0.3, 1.0, 7.0, 1e30, 1e40, 1e70, torch.inf]
    var = torch.tensor(sizes, dtype=torch.float64, device=harness.device())
    C = len(var)
    x = torch.zeros(4, C, 2, dtype=dtype, device=harness.device())
    totals = torch.cat([var.new_tensor([8.0]), torch.zeros_like(var), 8 * var])
    with kernels_on_cpu_tensors():
        _, stats = gpu.normalize(x, totals, None, None, 0.0, None, None, None, 0.1)
    exact = var.rsqrt().to(stats.dtype)
    is_ordinary = exact.isfinite() & (exact != 0)
    assert torch.equal(stats[1][~is_ordinary], exact[~is_ordinary])
    error = (stats[1][is_ordinary].double() / exact[is_ordinary].double() - 1).abs().max()
    # The root is rounded, its argument before it, and the reference after it.
    assert error <= 1.5 * torch.finfo(stats.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_deviations_of_every_size(run: Interpreter, dtype: torch.dtype) -> None:
    run(_check_rstd, dtype)


class TestManyTiles:
    """Programs with many tiles, whose results others add up."""

    @pytest.mark.parametrize("shape", MANY, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_every_kernel(
        self, run: Interpreter, shape: tuple[int, ...], layout: str, dtype: torch.dtype
    ) -> None:
        options = {"affine": ("weight", "bias"), "residual": True, "activation": "relu"}
        run(_on_a_small_device, _check_moments, shape, layout, dtype, 100.0)
        if dtype == torch.float32:
            run(_on_a_small_device, _check_moments, shape, layout, dtype, 2e4)
        run(_on_a_small_device, _check_forward, shape, layout, dtype, options)
        run(_on_a_small_device, _check_backward, shape, layout, dtype, options)


def _with_little_room(check: Callable[..., None], *args: Any) -> None:
    """``check(*args)`` where the last program loads few partial sums at a time."""
    plans._plan_of.cache_clear()
    try:
        with mock.patch.object(plans, "_MERGE", 64):
            check(*args)
    finally:
        plans._plan_of.cache_clear()


class TestFoldedRows:
    """The last program adds up the partial sums of all channels, a part of them at a time."""

    @pytest.mark.parametrize("shape", [(264, 33), (4112, 3)], ids=str)
    def test_partial_sums_are_added_in_several_turns(
        self, run: Interpreter, shape: tuple[int, int]
    ) -> None:
        dtype = torch.float32
        with mock.patch.object(plans, "_MERGE", 64):
            for reads in (1, 2, 3):
                cut = plan(*shape, 1, dtype.itemsize, True, reads)
                assert cut is not None
                assert cut.tile.FOLD
                _, merge, _, wide = cut.of_sums
                assert wide < cut.C if shape == (264, 33) else cut.num_partials > merge
        options = {"affine": ("weight", "bias"), "residual": True, "activation": "relu"}
        run(_with_little_room, _check_moments, shape, "channels-last", dtype, 1.0)
        run(_with_little_room, _check_backward, shape, "channels-last", dtype, options)
        run(_with_little_room, _check_two_backward, shape, "channels-last", dtype, {})


class TestAddresses:
    """Where tiles are, also in tensors of more than 2^31 values, which no memory holds."""

    @pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
    @pytest.mark.parametrize(
        ("N", "C", "S"), [(4096, 65, 50000), (3, 7, 1 << 31), (70001, 8192, 49)], ids=str
    )
    @pytest.mark.parametrize(("t", "block"), [(-1, 0), (-1, -1), (-2, -1)], ids=str)
    def test_beyond_32_bits(
        self, run: Interpreter, N: int, C: int, S: int, last: bool, t: int, block: int
    ) -> None:
        cut = plan(N, C, S, 2, last)
        assert cut is not None
        run(_check_addresses, cut, C, t, block, 1 << 31)

    @pytest.mark.parametrize(
        ("N", "C", "S"), [(5, 100, 196), (11, 3, 49), (3, 40, 5000), (20, 513, 4)], ids=str
    )
    @pytest.mark.parametrize("t", [0, -1])
    @pytest.mark.parametrize("block", [0, -1])
    def test_tiles_of_several_images(
        self, run: Interpreter, N: int, C: int, S: int, t: int, block: int
    ) -> None:
        cut = plan(N, C, S, 2, False, reads=1)
        assert cut is not None
        assert cut.tile.BLOCK_S > cut.tile.SPAN or S == 5000
        run(_check_addresses, cut, C, t, block, -1)


class TestOps:
    """``batch_norm_act`` as a GPU runs it."""

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
    def test_derivatives(self, run: Interpreter, activation: str, residual: bool) -> None:
        run(_check_ops, activation, residual)

    @pytest.mark.parametrize("name", ["x", "weight", "bias", "residual", "grad"])
    def test_a_negative_view(self, run: Interpreter, name: str) -> None:
        """One at a time: of two, the signs could make up for each other."""
        run(_check_negative_view, name)
