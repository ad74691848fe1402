"""The op ``batch_norm_act`` against torch's own ops: values, derivatives, layouts, compilers."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from bnrewrite import UnsupportedBatchNorm, reference
from bnrewrite.activations import ACTIVATIONS, activate
from bnrewrite.ops import epilogue, sites
from bnrewrite.ops.batch_norm_act import BATCH_NORM_ACT

EPS = 1e-3
SLOPE = 0.25
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
with_or_without_residual = pytest.mark.parametrize(
    "residual", [False, True], ids=["alone", "residual"]
)


@pytest.fixture(params=[False, True], ids=["kept", "recomputed"])
def recomputes(request: pytest.FixtureRequest) -> Any:
    """Both ways to split the work, whatever the device is, and with nobody to share with."""
    with (
        mock.patch.object(sites, "prefers_recomputing", return_value=request.param),
        mock.patch.object(epilogue, "NO_GROUP", "another name"),
    ):
        yield request.param


def _function(activation: str, training: bool = True, running: Any = (None,) * 3) -> Callable:
    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return BATCH_NORM_ACT(
            x, weight, bias, *running, training, True, 0.1, EPS, "", residual, activation, SLOPE
        )

    return function


def _plain(activation: str, training: bool = True, running: Any = (None,) * 3) -> Callable:
    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        mean, var, _ = running
        y = F.batch_norm(x, mean, var, weight, bias, training, 0.1, EPS)
        return activate(y if residual is None else y + residual, activation, SLOPE)

    return plain


def _inputs(
    shape: tuple[int, ...], residual: bool, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    acc = reference.accumulate_dtype(dtype)
    C = shape[1:2]
    kinds = [(shape, dtype), (C, acc), (C, acc), *([(shape, dtype)] if residual else [])]
    return [
        torch.randn(size, dtype=torch.float64).to(kind).requires_grad_() for size, kind in kinds
    ]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [one.detach().clone().requires_grad_(one.requires_grad) for one in tensors]


class TestDerivatives:
    """Of first and second order, against finite differences, both ways to split the work."""

    @every_activation
    @with_or_without_residual
    @pytest.mark.parametrize("order", [1, 2])
    def test_gradcheck(self, activation: str, residual: bool, order: int, recomputes: bool) -> None:
        check: Any = gradcheck if order == 1 else gradgradcheck
        assert check(_function(activation), _inputs((3, 2, 3), residual))

    @pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=4)), ids=str)
    @pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
    def test_only_gradients_that_are_asked_for(
        self, frozen: tuple[bool, ...], activation: str, recomputes: bool
    ) -> None:
        args = _inputs((4, 3, 5), True)
        for arg, is_frozen in zip(args, frozen, strict=True):
            arg.requires_grad_(not is_frozen)
        same = _copies(args)
        y, expected = _function(activation)(*args), _plain(activation)(*same)
        assert y.requires_grad == expected.requires_grad == (not all(frozen))
        if y.requires_grad:
            grad = torch.randn_like(y)
            y.backward(grad)
            expected.backward(grad)
        for arg, its in zip(args, same, strict=True):
            assert (arg.grad is None) == (its.grad is None)
            if arg.grad is not None and its.grad is not None:
                torch.testing.assert_close(arg.grad, its.grad, rtol=1e-11, atol=1e-11)


class TestNumbers:
    """Against torch's ops one after the other."""

    @every_activation
    @with_or_without_residual
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_values_gradients_and_running_statistics(
        self, activation: str, residual: bool, dtype: torch.dtype, training: bool, recomputes: bool
    ) -> None:
        args = _inputs((4, 3, 5, 7), residual, dtype)
        same = [one.double().detach().requires_grad_() for one in args]
        acc = reference.accumulate_dtype(dtype)
        running = [torch.randn(3).to(acc), torch.rand(3).to(acc) + 0.5, torch.tensor(3)]
        its_running = [running[0].double(), running[1].double(), running[2].clone()]
        y = _function(activation, training, running)(*args)
        expected = _plain(activation, training, its_running)(*same)
        assert y.dtype == dtype
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad.double())
        # 140 values per channel, each rounded where torch's separate ops round it.
        unit = torch.finfo(dtype).eps
        floor = 0.0 if dtype == torch.float64 else torch.finfo(torch.float32).eps
        pairs = [(y, expected)]
        # The derivative of hardswish jumps at 3, where rounding decides which side a value is on.
        if activation != "hardswish" or dtype.itemsize > 2:
            pairs += [(a.grad, b.grad) for a, b in zip(args, same, strict=True)]
        for mine, its in pairs:
            scale = max(its.abs().max().item(), 1.0)
            allowed = scale * (4 * unit + 32 * floor) + 1e-13
            assert (mine.double() - its).abs().max().item() <= allowed
        torch.testing.assert_close(running[0].double(), its_running[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(running[1].double(), its_running[1], rtol=1e-5, atol=1e-5)
        assert running[2].item() == (4 if training else 3)

    def test_nan_stays_nan(self, recomputes: bool) -> None:
        for activation in ACTIVATIONS:
            args = _inputs((4, 3, 5), True, torch.float32)
            with torch.no_grad():
                args[3][1, 1, 1] = float("nan")
            y, expected = _function(activation)(*args), _plain(activation)(*args)
            assert torch.equal(y.isnan(), expected.isnan()), activation

    @pytest.mark.parametrize("shape", [(5, 3), (0, 3, 4), (3, 5, 63, 37), (2, 3, 2, 3, 2)], ids=str)
    def test_shapes(self, shape: tuple[int, ...], recomputes: bool) -> None:
        args = _inputs(shape, True)
        same = _copies(args)
        y, expected = _function("relu")(*args), _plain("relu")(*same)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        y.sum().backward()
        expected.sum().backward()
        for one, its in zip(args, same, strict=True):
            torch.testing.assert_close(one.grad, its.grad, rtol=1e-9, atol=1e-9)


class TestResiduals:
    """What torch's ``+`` accepts, the op accepts, with the same result."""

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            ((1, 3, 1, 1), torch.float32),
            ((4, 1, 5, 7), torch.float32),
            ((2, 4, 3, 5, 7), torch.float32),
            ((), torch.float32),
            ((4, 3, 5, 7), torch.float64),
            ((4, 3, 5, 7), torch.float16),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_broadcast_and_promoted(
        self, shape: tuple[int, ...], dtype: torch.dtype, training: bool, recomputes: bool
    ) -> None:
        args = _inputs((4, 3, 5, 7), False, torch.float32)
        args.append(torch.randn(shape).to(dtype).requires_grad_())
        same = _copies(args)
        running = (torch.zeros(3), torch.ones(3), torch.tensor(0))
        y = _function("relu", training, running)(*args)
        expected = _plain("relu", training, (torch.zeros(3), torch.ones(3), None))(*same)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        y.sum().backward()
        expected.sum().backward()
        for one, its in zip(args, same, strict=True):
            torch.testing.assert_close(one.grad, its.grad, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_layouts(self, training: bool, recomputes: bool) -> None:
        layouts = (torch.contiguous_format, torch.channels_last)
        for mine, its in itertools.product(layouts, layouts):
            args = _inputs((4, 3, 5, 7), True)
            x = args[0].detach().contiguous(memory_format=mine)
            residual = args[3].detach().contiguous(memory_format=its)
            before = x.clone(), residual.clone()
            running = (torch.zeros(3).double(), torch.ones(3).double(), torch.tensor(0))
            y = _function("relu", training, running)(x, args[1], args[2], residual)
            copies = [one.clone() for one in running[:2]]
            expected = _plain("relu", training, (*copies, None))(x, args[1], args[2], residual)
            torch.testing.assert_close(y, expected, rtol=1e-1 if training else 1e-9, atol=1.0)
            assert y.stride() == expected.stride()
            assert torch.equal(x, before[0])
            assert torch.equal(residual, before[1])

    @every_activation
    def test_what_changes_in_place_afterwards(self, activation: str, recomputes: bool) -> None:
        """The residual may, and the result where it may after separate ops: nothing changes."""
        args = _inputs((4, 3, 5), True)
        same = _copies(args)
        for function, (x, weight, bias, residual) in (
            (_function(activation), args),
            (_plain(activation), same),
        ):
            shortcut = residual * 1
            y = function(x, weight, bias, shortcut)
            shortcut.add_(1)
            if activation != "relu":
                y.mul_(3)
            y.pow(2).sum().backward()
        for one, its in zip(args, same, strict=True):
            torch.testing.assert_close(one.grad, its.grad, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("slope", [-0.5, 0.0, 1.5])
    def test_slopes(self, slope: float, recomputes: bool) -> None:
        args = _inputs((4, 3, 5), True)
        same = _copies(args)
        x, weight, bias, residual = args
        tensors = (x, weight, bias, None, None, None)
        ours = BATCH_NORM_ACT(*tensors, True, True, 0.1, EPS, "", residual, "leaky_relu", slope)
        y = F.batch_norm(same[0], None, None, same[1], same[2], True, 0.1, EPS)
        expected = F.leaky_relu(y + same[3], slope)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
        for result in (ours, expected):
            result.pow(2).sum().backward()
        for one, its in zip(args, same, strict=True):
            torch.testing.assert_close(one.grad, its.grad, rtol=1e-9, atol=1e-9)


class TestErrors:
    """Of ``batch_norm``, and of the activation."""

    def test_unknown_activation(self) -> None:
        with pytest.raises(ValueError, match=r"unknown activation 'mish'.*relu6"):
            _function("mish")(*_inputs((4, 3), False))

    def test_one_value_per_channel(self) -> None:
        with pytest.raises(UnsupportedBatchNorm, match="more than 1 value"):
            _function("relu")(*_inputs((1, 3), True))


class TestCompiled:
    """Schema, and what compilers make of the op."""

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    @with_or_without_residual
    def test_opcheck(
        self, activation: str, residual: bool, training: bool, recomputes: bool
    ) -> None:
        args = _inputs((2, 3, 4), residual, torch.float32)
        running = (torch.zeros(3), torch.ones(3), torch.tensor(0))
        tail = (args[3] if residual else None, activation, SLOPE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.library.opcheck(
                BATCH_NORM_ACT, (*args[:3], *running, training, True, 0.1, EPS, "", *tail)
            )

    @every_activation
    def test_compiles_as_one_graph(self, activation: str, recomputes: bool) -> None:
        args = _inputs((4, 3, 5), True, torch.float32)
        same = _copies(args)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            y = torch.compile(_function(activation), fullgraph=True, backend="aot_eager")(*args)
        expected = _function(activation)(*same)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        expected.sum().backward()
        for one, its in zip(args, same, strict=True):
            torch.testing.assert_close(one.grad, its.grad)
        torch._dynamo.reset()
