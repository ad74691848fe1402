"""The ops, each alone: registration, derivatives, numbers against torch, layouts, errors."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import bnrewrite
from bnrewrite import UnsupportedBatchNorm, reference
from bnrewrite.kernels import aten, cpu_local, native
from bnrewrite.ops.activation_backward_reduce import ACTIVATION_BACKWARD_REDUCE
from bnrewrite.ops.batch_norm import BATCH_NORM
from bnrewrite.ops.batch_norm_local import BATCH_NORM_LOCAL, BATCH_NORM_LOCAL_BACKWARD
from bnrewrite.ops.moments import MOMENTS
from bnrewrite.ops.normalize import NORMALIZE
from bnrewrite.ops.normalize_backward import NORMALIZE_BACKWARD
from bnrewrite.ops.normalize_backward_reduce import NORMALIZE_BACKWARD_REDUCE
from bnrewrite.ops.normalize_keep_sum import NORMALIZE_KEEP_SUM
from bnrewrite.ops.normalize_two import NORMALIZE_TWO
from bnrewrite.ops.normalize_two_backward import NORMALIZE_TWO_BACKWARD
from bnrewrite.ops.normalize_two_backward_reduce import NORMALIZE_TWO_BACKWARD_REDUCE
from tests import IS_TORCH_211

EPS = 1e-3
SHAPES = [(5, 3), (2, 1), (7, 3, 5), (2, 3, 4, 5), (3, 1, 1, 2), (2, 3, 2, 3, 2)]
LONG = [(2, 3, 27500), (3, 5, 126, 97), (2, 4, 26, 35, 23)]
"""Shapes whose rows are long enough for the kernel that sums along rows."""
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(
    params=["alone", "in a group of one", "alone, by ATen", "in a group of one, by ATen"]
)
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Group argument of the op: without one it is one op each way, with one phases.

    By ATen is how a package computes that was installed without a compiler of C.
    """
    if request.param.endswith("by ATen"):
        monkeypatch.setattr(native, "library", lambda: None)
    if request.param.startswith("alone"):
        yield ""
        return
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    default = dist.group.WORLD
    assert default is not None
    yield default.group_name
    dist.destroy_process_group()


def _tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arguments of every phase op, consistent with each other."""
    num_channels = shape[1]
    acc = reference.accumulate_dtype(dtype)
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).to(dtype)
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    totals = reference.moments(x)
    stats = reference.statistics(totals, EPS, acc)
    return {
        "x": x,
        "grad": grad,
        "totals": totals,
        "stats": stats,
        "weight": torch.randn(num_channels, dtype=acc),
        "bias": torch.randn(num_channels, dtype=acc),
        "sums": reference.normalize_backward_reduce(grad, x, stats),
    }


def _running(num_channels: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        torch.randn(num_channels).to(dtype),
        (torch.rand(num_channels) + 0.5).to(dtype),
        torch.tensor(3),
    ]


def _phase_calls(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, tuple]:
    """Every phase op with arguments for it."""
    t = _tensors(shape, dtype)
    running = _running(shape[1], t["stats"].dtype)
    return {
        "moments": (MOMENTS, (t["x"],)),
        "normalize": (
            NORMALIZE,
            (t["x"], t["totals"], t["weight"], t["bias"], EPS, *running, 0.1, True),
        ),
        "normalize without anything optional": (
            NORMALIZE,
            (t["x"], t["totals"], None, None, EPS, None, None, None, None, False),
        ),
        "normalize_backward_reduce": (NORMALIZE_BACKWARD_REDUCE, (t["grad"], t["x"], t["stats"])),
        "normalize_backward": (
            NORMALIZE_BACKWARD,
            (t["grad"], t["x"], t["stats"], t["totals"], t["weight"], t["sums"]),
        ),
        "normalize_backward without weight": (
            NORMALIZE_BACKWARD,
            (t["grad"], t["x"], t["stats"], t["totals"], None, t["sums"]),
        ),
        "normalize with residual and activation": (
            NORMALIZE,
            (*(t[k] for k in ("x", "totals", "weight", "bias")), EPS, *running, None, False,
             t["grad"], "silu", 0.0),
        ),
        "normalize_keep_sum": (
            NORMALIZE_KEEP_SUM,
            (*(t[k] for k in ("x", "totals", "weight", "bias")), EPS, *running, 0.1, False,
             t["grad"], "hardswish", 0.0),
        ),
        "normalize_keep_sum without anything optional": (
            NORMALIZE_KEEP_SUM,
            (t["x"], t["totals"], None, None, EPS, None, None, None, None, False, t["grad"],
             "identity", 0.0),
        ),
        "normalize_two": (
            NORMALIZE_TWO,
            (t["grad"], reference.moments(t["grad"]), t["weight"], None, EPS, *running, 0.1, False,
             t["x"], t["totals"], t["weight"], t["bias"], 2 * EPS,
             *_running(shape[1], t["stats"].dtype), None, True, "silu", 0.0),
        ),
        "normalize_two without anything optional": (
            NORMALIZE_TWO,
            (t["grad"], reference.moments(t["grad"]), None, None, EPS, None, None, None, None,
             False, t["x"], t["totals"], None, None, EPS, None, None, None, None, False,
             "identity", 0.0),
        ),
        "normalize_two_backward_reduce": (
            NORMALIZE_TWO_BACKWARD_REDUCE,
            (t["grad"], t["x"] * 2, t["stats"], None, t["bias"], t["x"], t["stats"].clone(),
             t["weight"], t["bias"].clone(), "silu", 0.0),
        ),
        "normalize_two_backward_reduce without an activation": (
            NORMALIZE_TWO_BACKWARD_REDUCE,
            (t["grad"], t["x"] * 2, t["stats"], None, None, t["x"], t["stats"].clone(), None, None,
             "identity", 0.0),
        ),
        "normalize_two_backward": (
            NORMALIZE_TWO_BACKWARD,
            (t["grad"], t["x"] * 2, t["stats"], t["totals"], None, t["bias"], t["sums"], t["x"],
             *(t[k].clone() for k in ("stats", "totals", "weight", "bias", "sums")), "gelu", 0.0),
        ),
        "activation_backward_reduce": (
            ACTIVATION_BACKWARD_REDUCE,
            (*(t[k] for k in ("grad", "x", "stats", "weight", "bias")), None, "silu", 0.0, True),
        ),
        "activation_backward_reduce from the argument": (
            ACTIVATION_BACKWARD_REDUCE,
            (*(t[k] for k in ("grad", "x", "stats", "weight", "bias", "x")), "gelu", 0.0, False),
        ),
        "activation_backward_reduce from the result": (
            ACTIVATION_BACKWARD_REDUCE,
            (t["grad"], t["x"], t["stats"], None, None, t["x"], "relu", 0.0, True),
        ),
        "normalize_backward through an activation": (
            NORMALIZE_BACKWARD,
            (*(t[k] for k in ("grad", "x", "stats", "totals", "weight", "sums", "bias")), None,
             "gelu_tanh", 0.0),
        ),
        "batch_norm_local": (
            BATCH_NORM_LOCAL,
            (t["x"], t["weight"], t["bias"], EPS, *running, 0.1, True),
        ),
        "batch_norm_local without anything optional": (
            BATCH_NORM_LOCAL,
            (t["x"], None, None, EPS, None, None, None, None, False),
        ),
        "batch_norm_local_backward": (
            BATCH_NORM_LOCAL_BACKWARD,
            (t["grad"], t["x"], *t["stats"].clone().unbind(), t["weight"]),
        ),
        "batch_norm_local_backward without weight": (
            BATCH_NORM_LOCAL_BACKWARD,
            (t["grad"], t["x"], *t["stats"].clone().unbind(), None),
        ),
    }  # fmt: skip


PHASES = list(_phase_calls((2, 1)))


def _with_gradients(args: tuple, op: Any) -> tuple:
    """``args`` with gradients asked of all floating-point tensors that the op does not write."""
    written = {
        argument.name
        for argument in op._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    return tuple(
        arg.detach().requires_grad_()
        if isinstance(arg, Tensor) and arg.is_floating_point() and argument.name not in written
        else arg
        for arg, argument in zip(args, op._schema.arguments, strict=False)
    )


def _quietly(check: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check()


class TestRegistration:
    """Schema, fake, autograd and what a compiler makes of them, by torch's own checks."""

    @pytest.mark.parametrize("phase", PHASES)
    @pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
    @pytest.mark.parametrize("shape", [(3, 2), (2, 3, 4, 5), (0, 3, 4), (3, 5, 63, 37)], ids=str)
    def test_opcheck_of_phases(self, phase: str, gradients: bool, shape: tuple[int, ...]) -> None:
        op, args = _phase_calls(shape, torch.float32)[phase]
        if gradients:
            args = _with_gradients(args, op)
        _quietly(lambda: torch.library.opcheck(op, args))

    @pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("shape", [(3, 2), (2, 3, 4, 5)], ids=str)
    def test_opcheck_of_batch_norm(
        self, gradients: bool, training: bool, momentum: float | None, shape: tuple[int, ...]
    ) -> None:
        t = _tensors(shape, torch.float32)
        running = _running(shape[1], torch.float32)
        args = (t["x"], t["weight"], t["bias"], *running, training, True, momentum, EPS, "", False)
        if gradients:
            args = _with_gradients(args, BATCH_NORM)
        _quietly(lambda: torch.library.opcheck(BATCH_NORM, args))

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
    def test_fake_kernels_promise_what_cpu_kernels_return(
        self, dtype: torch.dtype, layout: str
    ) -> None:
        for name, (op, args) in _phase_calls((2, 3, 4, 5), dtype).items():
            if layout == "channels-last":
                args = tuple(
                    a.contiguous(memory_format=torch.channels_last)
                    if isinstance(a, Tensor) and a.dim() == 4
                    else a
                    for a in args
                )
            results = op(*args)
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
            results = results if isinstance(results, tuple) else (results,)
            fakes = fakes if isinstance(fakes, tuple) else (fakes,)
            for real, fake in zip(results, fakes, strict=True):
                assert real.dtype == fake.dtype, name
                assert real.shape == fake.shape, name
                assert real.stride() == fake.stride(), name


class TestDerivatives:
    """Against finite differences, in float64."""

    @pytest.mark.parametrize("phase", PHASES)
    @pytest.mark.parametrize("shape", [(3, 2), (2, 3, 4), (2, 1, 2, 3)], ids=str)
    def test_gradcheck_of_phases(self, phase: str, shape: tuple[int, ...]) -> None:
        op, args = _phase_calls(shape)[phase]
        # Running statistics move at each call; gradcheck calls often.
        args = tuple(
            None
            if argument.alias_info is not None and argument.alias_info.is_write
            else arg.clone()
            if isinstance(arg, Tensor)
            else arg
            for arg, argument in zip(args, op._schema.arguments, strict=False)
        )
        assert gradcheck(op, _with_gradients(args, op), check_undefined_grad=False)

    @pytest.mark.parametrize("shape", [(4, 2), (3, 3, 4), (2, 1, 2, 3), (2, 2, 1, 2, 3)], ids=str)
    @pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "neither"])
    @pytest.mark.parametrize("order", [1, 2])
    def test_gradcheck_of_batch_norm(
        self, shape: tuple[int, ...], affine: str, order: int, group: str
    ) -> None:
        t = _tensors(shape)
        weight = t["weight"].requires_grad_() if "weight" in affine else None
        bias = t["bias"].requires_grad_() if "bias" in affine else None

        def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return BATCH_NORM(x, weight, bias, None, None, None, True, True, 0.1, EPS, group)

        check = gradcheck if order == 1 else gradgradcheck
        inputs: Any = (t["x"].requires_grad_(), weight, bias)
        assert check(function, inputs)

    def test_gradcheck_in_evaluation(self) -> None:
        t = _tensors((2, 3, 4))
        running = _running(3)

        def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return BATCH_NORM(x, weight, bias, *running, False, True, 0.1, EPS, "")

        args = tuple(t[name].requires_grad_() for name in ("x", "weight", "bias"))
        assert gradcheck(function, args)
        assert gradgradcheck(function, args)

    @pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)), ids=str)
    def test_only_gradients_that_are_asked_for(
        self, frozen: tuple[bool, bool, bool], group: str
    ) -> None:
        t = _tensors((4, 3, 5))
        args = [t[name] for name in ("x", "weight", "bias")]
        for arg, is_frozen in zip(args, frozen, strict=True):
            arg.requires_grad_(not is_frozen)
        y = BATCH_NORM(*args, None, None, None, True, True, 0.1, EPS, group)
        assert y.requires_grad == (not all(frozen))
        if y.requires_grad:
            y.backward(t["grad"])
        same = [arg.detach().clone().requires_grad_(arg.requires_grad) for arg in args]
        expected = F.batch_norm(same[0], None, None, same[1], same[2], True, 0.1, EPS)
        if y.requires_grad:
            expected.backward(t["grad"])
        for arg, theirs in zip(args, same, strict=True):
            assert (arg.grad is None) == (theirs.grad is None)
            if arg.grad is not None and theirs.grad is not None:
                torch.testing.assert_close(arg.grad, theirs.grad, rtol=1e-12, atol=1e-12)

    def test_forward_mode_raises_instead_of_being_wrong(self) -> None:
        x = _tensors((4, 3))["x"]

        def forward_mode() -> None:
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                BATCH_NORM(dual, *[None] * 5, True, True, 0.1, EPS, "")

        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            _quietly(forward_mode)


def _evaluate(
    x: Tensor,
    grad: Tensor,
    parameters: list[Tensor | None],
    running: list[Tensor],
    *,
    group: str | None = None,
) -> list[Tensor]:
    """y, dx, dweight, dbias, running_mean, running_var in training; torch's own with no group."""
    x = x.detach().requires_grad_()
    parameters = [None if p is None else p.detach().clone().requires_grad_() for p in parameters]
    running = [tensor.clone() for tensor in running]
    if group is not None:
        y = BATCH_NORM(x, *parameters, *running, True, True, 0.3, EPS, group)
    else:
        weight, bias = parameters
        y = F.batch_norm(x, running[0], running[1], weight, bias, True, 0.3, EPS)
    y.backward(grad)
    grads = [p.grad for p in (x, *parameters) if p is not None and p.grad is not None]
    return [y.detach(), *grads, running[0], running[1]]


def _assert_as_precise_as_torch(
    x: Tensor, grad: Tensor, parameters: list[Tensor | None], running: list[Tensor], group: str
) -> None:
    """Errors against float64 are at most twice those of torch's own kernels in the same dtype.

    What rounding costs by itself is allowed on top, as torch may happen to be exact: an ulp of the
    largest term of each result, times sqrt(M) for sums of M values, and times ``mean / std`` as the
    mean itself is rounded. float64 has no wider judge, so that a handful of roundings count; there
    the packed sums cost ``1e-16 * mean^2 / var`` in the variance, and the judge adds M values one
    after the other (0.1 * sqrt(M) roundings, measured against NumPy's ``longdouble``).
    """
    exact = _evaluate(
        x.double(),
        grad.double(),
        [None if p is None else p.double() for p in parameters],
        [t.double() if t.is_floating_point() else t for t in running],
    )
    ours = _evaluate(x, grad, parameters, running, group=group)
    theirs = _evaluate(x, grad, parameters, running)
    dims = reference.reduced_dims(x)
    mean, var = x.double().mean(dims), x.double().var(dims, correction=0)
    largest_grad = grad.double().abs().max().item()
    largest_weight = 1.0 if parameters[0] is None else parameters[0].abs().max().item()
    largest_xhat = (x.double() - reference.per_channel(mean, x)).abs().max() / var.min().sqrt()
    root = (x.numel() / x.size(1)) ** 0.5
    scales = {
        "y": exact[0].abs().max().item(),
        "dx": largest_weight * largest_grad / (var.min() + EPS).sqrt().item() * largest_xhat,
        "dw": largest_grad * largest_xhat * root,
        "db": largest_grad * root,
        "running_mean": (mean.abs() + var.sqrt()).max().item(),
        "running_var": 2 * var.max().item(),
    }
    names = ["y", "dx"]
    names += [name for name, p in zip(("dw", "db"), parameters, strict=True) if p is not None]
    names += ["running_mean", "running_var"]
    ratio = (mean.abs() / (var + EPS).sqrt()).max().item()
    slack = 16 + ratio**2 + root / 8 if x.dtype == torch.float64 else 1 + ratio
    for name, a, b, true in zip(names, ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype, name
        allowed = torch.finfo(a.dtype).eps * float(scales[name]) * slack
        our_error = (a.double() - true).abs().max().item()
        their_error = (b.double() - true).abs().max().item()
        assert our_error <= 2 * their_error + allowed, (name, our_error, their_error, allowed)


class TestNumbers:
    """Training forward and backward against ``F.batch_norm``."""

    @pytest.mark.parametrize("shape", LONG, ids=str)
    def test_long_shapes_are_long(self, shape: tuple[int, ...]) -> None:
        x = torch.empty(shape)
        assert aten.has_long_rows(x, least=cpu_local.LEAST)

    @pytest.mark.parametrize("shape", SHAPES + LONG, ids=str)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_every_shape_and_dtype(
        self, shape: tuple[int, ...], dtype: torch.dtype, group: str
    ) -> None:
        t = _tensors(shape, dtype)
        acc = reference.accumulate_dtype(dtype)
        _assert_as_precise_as_torch(
            t["x"], t["grad"], [t["weight"], t["bias"]], _running(shape[1], acc), group
        )

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("affine", ["weight and bias", "weight", "neither"])
    @pytest.mark.parametrize("shape", [(3, 5, 63, 37), (2, 3, 4)], ids=str)
    def test_without_weight_or_bias(
        self, affine: str, dtype: torch.dtype, shape: tuple[int, ...], group: str
    ) -> None:
        t = _tensors(shape, dtype)
        acc = reference.accumulate_dtype(dtype)
        weight = t["weight"] if "weight" in affine else None
        bias = t["bias"] if "bias" in affine else None
        _assert_as_precise_as_torch(
            t["x"], t["grad"], [weight, bias], _running(shape[1], acc), group
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_parameters_and_statistics_of_half_precision(
        self, dtype: torch.dtype, group: str
    ) -> None:
        t = _tensors((4, 3, 7, 9), dtype)
        parameters: list[Tensor | None] = [t["weight"].to(dtype), t["bias"].to(dtype)]
        _assert_as_precise_as_torch(t["x"], t["grad"], parameters, _running(3, dtype), group)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 7), (3, 5, 63, 37)], ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
    def test_a_mean_of_ten_thousand_deviations_loses_no_more_digits_than_torch(
        self, dtype: torch.dtype, shape: tuple[int, ...], layout: str, group: str
    ) -> None:
        t = _tensors(shape, dtype)
        x = t["x"] + 2e4
        if layout == "channels-last" and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
            t["grad"] = t["grad"].contiguous(memory_format=torch.channels_last)
        acc = reference.accumulate_dtype(dtype)
        _assert_as_precise_as_torch(
            x, t["grad"], [t["weight"], t["bias"]], _running(shape[1], acc), group
        )

    @pytest.mark.parametrize("shape", [(4, 3, 5), (8, 3, 129, 127)], ids=str)
    def test_alone_no_mean_is_too_large_for_float64(self, shape: tuple[int, ...]) -> None:
        """Packed sums would have no digit left of the variance."""
        x = 1e8 + torch.randn(shape, dtype=torch.float64)
        results = []
        for evaluate in (BATCH_NORM, F.batch_norm):
            a, mean, var = x.clone().requires_grad_(), x.new_zeros(3), x.new_ones(3)
            if evaluate is BATCH_NORM:
                y = BATCH_NORM(a, None, None, mean, var, None, True, True, 0.1, EPS, "")
            else:
                y = F.batch_norm(a, mean, var, training=True, momentum=0.1, eps=EPS)
            y.square().mul(x.sin()).sum().backward()
            results.append([y.detach(), a.grad, mean, var])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("shape", [(4, 3, 5), (3, 3, 63, 63)], ids=str)
    def test_a_bad_value_spoils_its_channel_and_no_other(
        self, value: float, shape: tuple[int, ...], group: str
    ) -> None:
        t = _tensors(shape, torch.float32)
        clean = BATCH_NORM(t["x"], *[None] * 5, True, True, 0.1, EPS, group)
        t["x"][1, 1, 2] = value
        y = BATCH_NORM(t["x"], *[None] * 5, True, True, 0.1, EPS, group)
        expected = F.batch_norm(t["x"], None, None, training=True, eps=EPS)
        assert torch.equal(y.isnan(), expected.isnan())
        torch.testing.assert_close(y[:, ::2], clean[:, ::2], rtol=0, atol=0)

    def test_a_constant_channel_gives_the_bias(self, group: str) -> None:
        x = torch.full((4, 2, 5), 123.456)
        bias = torch.tensor([1.0, -2.0])
        y = BATCH_NORM(x, torch.ones(2), bias, None, None, None, True, True, 0.1, EPS, group)
        expected = F.batch_norm(x, None, None, torch.ones(2), bias, True, 0.1, EPS)
        # 123.456 in float32 has steps of 8e-6, which rstd = 1 / sqrt(eps) magnifies by 32.
        torch.testing.assert_close(y, expected, rtol=0, atol=5e-4)

    def test_an_empty_batch_changes_nothing(self, group: str) -> None:
        running = _running(3, torch.float32)
        before = [tensor.clone() for tensor in running]
        x = torch.empty(0, 3, 4, 5, requires_grad=True)
        weight = torch.ones(3, requires_grad=True)
        y = BATCH_NORM(x, weight, torch.zeros(3), *running, True, True, 0.1, EPS, group)
        assert y.shape == x.shape
        y.sum().backward()
        assert torch.equal(weight.grad, torch.zeros(3))  # pyright: ignore[reportArgumentType]
        assert x.grad is not None
        assert x.grad.shape == x.shape
        for now, then in zip(running, before, strict=True):
            assert torch.equal(now, then)


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors with the values of ``x`` (N, C, H, W) and other strides."""
    wide = torch.zeros(x.size(0), x.size(1), x.size(2) * 2, x.size(3) + 1, dtype=x.dtype)
    wide[:, :, ::2, 1:] = x
    # A transposed copy: neither contiguous nor channels-last.
    permuted = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return {
        "contiguous": x.contiguous(),
        "channels-last": x.contiguous(memory_format=torch.channels_last),
        "sliced": wide[:, :, ::2, 1:],
        "permuted": permuted,
        "channels sliced": torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    }


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), LONG[1]], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_training_goes_on_after_a_call_in_inference_mode(
    dtype: torch.dtype, shape: tuple[int, ...], group: str
) -> None:
    """What that call has cached serves the others."""
    aten.ones.cache_clear()
    t = _tensors(shape, dtype)
    arguments = (t["weight"], t["bias"], None, None, None, True, True, 0.1, EPS, group)
    with torch.inference_mode():
        expected = BATCH_NORM(t["x"], *arguments)
    x = t["x"].clone().requires_grad_()
    y = BATCH_NORM(x, *arguments)
    y.backward(t["grad"])
    assert torch.equal(y, expected)
    assert x.grad is not None
    with torch.inference_mode():
        assert torch.equal(BATCH_NORM(t["x"], *arguments), expected)


LAYOUTS = list(_layouts(torch.zeros(2, 3, 4, 5)))


class TestLayouts:
    """Any strides of input and gradient, and the memory format of the result."""

    @pytest.mark.parametrize("layout_grad", [*LAYOUTS, "expanded"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 5, 63, 37)], ids=str)
    def test_strides_do_not_change_results(
        self, layout: str, layout_grad: str, shape: tuple[int, ...], group: str
    ) -> None:
        t = _tensors(shape)
        parameters: list[Tensor | None] = [t["weight"], t["bias"]]
        grad = t["grad"]
        if layout_grad == "expanded":
            strided = grad[:1, :, :1, :1].expand(shape)
            grad = strided.contiguous()
        else:
            strided = _layouts(grad)[layout_grad]
        running = _running(shape[1])
        expected = _evaluate(t["x"], grad, parameters, running)
        x = _layouts(t["x"])[layout]
        assert torch.equal(x, t["x"])
        results = _evaluate(x, strided, parameters, running, group=group)
        for result, true in zip(results, expected, strict=True):
            torch.testing.assert_close(result, true, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_memory_format_and_dtype_are_those_of_torch(
        self, layout: str, dtype: torch.dtype, training: bool, group: str
    ) -> None:
        x = _layouts(torch.randn(2, 3, 4, 5).to(dtype))[layout].detach().requires_grad_()
        acc = reference.accumulate_dtype(dtype)
        running = _running(3, acc)
        y = BATCH_NORM(x, None, None, *running, training, True, 0.1, EPS, group)
        expected = F.batch_norm(x, running[0], running[1], None, None, training, 0.1, EPS)
        assert y.dtype == dtype
        assert y.stride() == expected.stride()
        y.backward(y.detach())
        assert x.grad is not None
        assert x.grad.dtype == dtype

    def test_channels_last_3d(self, group: str) -> None:
        t = _tensors((2, 3, 4, 5, 6), torch.float32)
        x = t["x"].contiguous(memory_format=torch.channels_last_3d)
        y = BATCH_NORM(x, *[None] * 5, True, True, 0.1, EPS, group)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        _assert_as_precise_as_torch(
            x, t["grad"], [t["weight"], t["bias"]], _running(3, torch.float32), group
        )

    def test_input_is_left_alone(self, group: str) -> None:
        for layout in LAYOUTS:
            x = _layouts(torch.randn(2, 3, 4, 5))[layout]
            before = x.clone()
            BATCH_NORM(x, *[None] * 5, True, True, 0.1, EPS, group)
            assert torch.equal(x, before)


class TestRunningStatistics:
    """What training leaves in the buffers."""

    @pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
    @pytest.mark.parametrize("track", [True, False], ids=["tracked", "untracked"])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("buffers", [True, False], ids=["buffers", "no buffers"])
    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
    def test_every_combination_is_that_of_the_module(
        self,
        momentum: float | None,
        track: bool,
        training: bool,
        buffers: bool,
        affine: bool,
        group: str,
    ) -> None:
        bn = torch.nn.BatchNorm1d(3, EPS, momentum, affine, buffers, dtype=torch.float64)
        bn.train(training).track_running_stats = track
        same = torch.nn.BatchNorm1d(3, EPS, momentum, affine, buffers, dtype=torch.float64)
        same.load_state_dict(bn.state_dict())
        for _ in range(3):
            x = torch.randn(5, 3, 4, dtype=torch.float64) + 1
            y = BATCH_NORM(
                x, same.weight, same.bias, same.running_mean, same.running_var,
                same.num_batches_tracked, training, track, momentum, EPS, group,
            )  # fmt: skip
            torch.testing.assert_close(y, bn(x), rtol=1e-12, atol=1e-12)
        for mine, its in zip(same.buffers(), bn.buffers(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("running_dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("momentum", [0.25, None])
    def test_statistics_may_have_another_precision(
        self, dtype: torch.dtype, running_dtype: torch.dtype, momentum: float | None, group: str
    ) -> None:
        x = torch.randn(4, 3, 5).to(dtype)
        mean, var, count = _running(3, running_dtype)
        factor = 0.25  # momentum, or the average of the fourth batch
        expected_mean = mean.double().lerp(x.double().mean((0, 2)), factor)
        expected_var = var.double().lerp(x.double().var((0, 2)), factor)
        BATCH_NORM(x, None, None, mean, var, count, True, True, momentum, EPS, group)
        assert mean.dtype == running_dtype
        # The buffer rounds once; the batch statistics are those of float32 at worst.
        tolerance = max(torch.finfo(running_dtype).eps, 1e-6)
        torch.testing.assert_close(mean.double(), expected_mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(var.double(), expected_var, rtol=tolerance, atol=tolerance)
        assert count.item() == 4

    def test_batch_statistics_in_evaluation_count_no_batch(self) -> None:
        """A layer whose running statistics were taken away normalizes by the batch in eval."""
        count = torch.tensor(3)
        BATCH_NORM(torch.randn(4, 3), *[None] * 4, count, False, True, 0.1, EPS, "")
        assert count.item() == 3


class TestErrors:
    """Each names what was wrong, the value and the way out."""

    @pytest.mark.parametrize(
        ("shape", "dtype", "sizes", "message"),
        [
            ((3,), torch.float32, (3, 3, 3, 3), r"\(N, C, \*\).*1 dimension.*\(3,\).*unsqueeze"),
            ((4, 3), torch.int64, (3, 3, 3, 3), r"floating-point.*torch\.int64.*float\(\)"),
            ((4, 3), torch.float32, (5, 3, 3, 3), r"weight.*\(5,\).*3 channels.*\(4, 3\).*Check"),
            ((4, 3), torch.float32, (3, 5, 3, 3), r"bias.*\(5,\).*3 channels"),
            ((4, 3), torch.float32, (3, 3, 1, 3), r"running_mean.*\(1,\).*3 channels"),
            ((4, 3), torch.float32, (3, 3, 3, 4), r"running_var.*\(4,\).*3 channels"),
            ((1, 3, 1), torch.float32, (3, 3, 3, 3), r"more than 1 value.*\(1, 3, 1\).*\.eval\(\)"),
        ],
    )
    def test_wrong_arguments(
        self, shape: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, ...], message: str
    ) -> None:
        x = torch.ones(shape, dtype=dtype)
        tensors = [torch.ones(size) for size in sizes]
        count = torch.tensor(0)
        with pytest.raises(UnsupportedBatchNorm, match=message):
            BATCH_NORM(x, *tensors, count, True, True, 0.1, EPS, "")
        assert count.item() == 0
        assert all(torch.equal(t, torch.ones_like(t)) for t in tensors)

    @pytest.mark.parametrize("training", [True, False])
    def test_tensors_of_another_device_than_the_gpu_of_the_input(self, training: bool) -> None:
        message = r"bias is on cpu but the input is on cuda:0.*\.to\(\)"
        with FakeTensorMode():
            x = torch.ones(4, 3, device="cuda")
            weight, mean, var = torch.ones(3, 3, device="cuda").unbind()
            tensors = (x, weight, torch.ones(3), mean, var, None)
            with pytest.raises(UnsupportedBatchNorm, match=message):
                BATCH_NORM(*tensors, training, True, 0.1, EPS, "")

    def test_distributed_tensors_name_the_way_out(self) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            mesh = init_device_mesh("cpu", (2,))
            model: Any = nn.Sequential(nn.BatchNorm1d(3))
            model = bnrewrite.convert(distribute_module(model, mesh))
            x = DTensor.from_local(torch.randn(4, 3), mesh, [Replicate()])
            with pytest.raises(UnsupportedBatchNorm, match=r"^0: .*DTensor.*to_local\(\)"):
                model(x)
            if not IS_TORCH_211:
                # There, torch has no rule for its own batch_norm.
                assert isinstance(model.eval()(x), DTensor)
        finally:
            dist.destroy_process_group()

    def test_half_of_the_running_statistics(self) -> None:
        with pytest.raises(UnsupportedBatchNorm, match="only one of running_mean and running_var"):
            BATCH_NORM(
                torch.ones(4, 3), None, None, torch.ones(3), None, None, True, True, 0.1, EPS, ""
            )

    def test_one_value_per_channel_is_refused_where_torch_refuses_it(self) -> None:
        for training, buffers in itertools.product([True, False], repeat=2):
            running = _running(3, torch.float32) if buffers else [None] * 3
            args = (torch.ones(1, 3), None, None, *running, training, True, 0.1, EPS, "")
            if not training and buffers:
                BATCH_NORM(*args)
                continue
            with pytest.raises(UnsupportedBatchNorm, match="more than 1 value"):
                BATCH_NORM(*args)
