"""What a launch hands to code that is compiled already, on tensors that only stand for a GPU's."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bnrewrite.kernels.triton import launch, launcher
from bnrewrite.kernels.triton.launcher import Launch
from bnrewrite.kernels.triton.plan import plan_of

_STREAM = 7


class _Compiled:
    """A compiled kernel that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args, stream: self.calls.append((grid, args, stream))


class _Triton:
    """Compiles whatever it is given."""

    def __init__(self) -> None:
        self.compiled: list[_Compiled] = []

    def run(self, _: Launch, device: int) -> _Compiled:
        assert device == 0
        self.compiled.append(_Compiled())
        return self.compiled[-1]


@pytest.fixture(name="triton")
def _triton() -> Any:
    triton = _Triton()
    raw_stream = mock.Mock(return_value=_STREAM)
    with (
        mock.patch.object(Launch, "_run_by_triton", lambda one, device: triton.run(one, device)),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", raw_stream, create=True),
        mock.patch.dict(launcher._COMPILED, clear=True),
    ):
        yield triton


def _normalize(x: Tensor, weight: Tensor | None, momentum: float | None = 0.1) -> Launch:
    C = x.size(1)
    totals = torch.zeros(2 * C + 1, dtype=torch.float64)
    own = launch.Normalized(
        (totals, weight, None, torch.zeros(2, C), None, None, None),
        (1e-5, momentum or 0.0),
        momentum is None,
    )
    return launch.normalize(plan_of(x), x, None, x, None, own, None, "relu", 0.5)


def test_known_code_gets_addresses_numbers_and_constants_in_the_order_of_its_arguments(
    triton: _Triton,
) -> None:
    x, weight = torch.randn(3, 8, 5), torch.ones(8)
    _normalize(x, weight)._run_on(0)
    one = _normalize(x, weight)
    one._run_on(0)
    (compiled,) = triton.compiled
    ((grid, args, stream),) = compiled.calls
    assert grid == one.grid
    assert stream == _STREAM
    given = dict(zip(one.kernel.arg_names, args, strict=True))
    assert given["x"] == given["y"] == x.data_ptr()
    assert given["weight"] == weight.data_ptr()
    assert given["bias"] is given["residual"] is None
    assert (given["eps"], given["momentum"], given["slope"]) == (1e-5, 0.1, 0.5)
    assert tuple(given[name] for name in "NCSP") == one.plan.sizes
    assert {name: given[name] for name in one.constants} == one.constants


def test_code_is_compiled_anew_for_what_triton_specialises_on(triton: _Triton) -> None:
    memory = torch.randn(3 * 8 * 5 + 1)
    x, weight = memory[:-1].view(3, 8, 5), torch.ones(8)
    variants = [
        _normalize(x, weight),
        _normalize(x, None),
        _normalize(x, weight.half()),
        _normalize(x.bfloat16(), weight),
        _normalize(memory[1:].view(3, 8, 5), weight),
        _normalize(x, weight, momentum=None),
        _normalize(x.transpose(1, 2).contiguous().transpose(1, 2), weight),
    ]
    for number, one in enumerate(variants, 1):
        one._run_on(0)
        assert len(triton.compiled) == number
    for one in variants:
        one._run_on(0)
    assert len(triton.compiled) == len(variants)


def test_other_sizes_run_the_same_code(triton: _Triton) -> None:
    for N in (3, 4):
        _normalize(torch.randn(N, 8, 5), torch.ones(8))._run_on(0)
    assert len(triton.compiled) == 1
