"""What a launch hands to code that is compiled already, on tensors that only stand for a GPU's."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton import knobs

from bnrewrite.kernels.triton import launch, launcher
from bnrewrite.kernels.triton.launcher import Launch
from bnrewrite.kernels.triton.plan import plan_of

_STREAM = 7


class _Compiled:
    """A compiled kernel that notes its calls; it has registers once it is loaded for one."""

    def __init__(self, needed: int, bound: int | None) -> None:
        self._registers = min(needed, 64 if bound is None else bound)
        self._spills = max(needed - self._registers, 0)
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        self.n_regs, self.n_spills = self._registers, self._spills
        return lambda *args, stream: self.calls.append((grid, args, stream))


class _Triton:
    """Compiles whatever it is given; ptxas takes 64 registers if it may choose."""

    def __init__(self) -> None:
        self.needed = 64
        self.compiled: list[_Compiled] = []
        self.options: list[dict[str, Any]] = []

    def warmup(self, *_: Any, grid: tuple[int, int, int], **options: Any) -> _Compiled:
        assert len(grid) == 3
        self.options.append(options)
        self.compiled.append(_Compiled(self.needed, options.get("maxnreg")))
        return self.compiled[-1]


@pytest.fixture(name="triton")
def _triton() -> Any:
    fake = _Triton()
    raw_stream = mock.Mock(return_value=_STREAM)
    with (
        mock.patch.object(type(launch.normalize_kernel), "warmup", fake.warmup),
        mock.patch.object(knobs.runtime, "interpret", False),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", raw_stream, create=True),
        mock.patch.dict(launcher._COMPILED, clear=True),
    ):
        yield fake


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
    one = _normalize(x, weight)
    for _ in range(2):
        one._run_on(0)
    (compiled,) = triton.compiled
    first, (grid, args, stream) = compiled.calls
    assert first == (grid, args, stream)
    assert grid == one.grid
    assert stream == _STREAM
    given = dict(zip(one.kernel.arg_names, args, strict=True))
    assert given["x"] == given["y"] == x.data_ptr()
    assert given["weight"] == weight.data_ptr()
    assert given["bias"] is given["residual"] is None
    assert (given["eps"], given["momentum"], given["slope"]) == (1e-5, 0.1, 0.5)
    assert tuple(given[name] for name in "NCSP") == one.plan.sizes
    assert {name: given[name] for name in one.constants} == one.constants


def test_code_is_compiled_anew_for_what_triton_specializes_on(triton: _Triton) -> None:
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


def test_code_that_spills_is_not_run(triton: _Triton) -> None:
    """It gets as many more registers as it needs, and what is found once is kept."""
    triton.needed = 75
    one = _normalize(torch.randn(4, 64, 64), torch.ones(64))
    for _ in range(2):
        one._run_on(0)
    assert [options.get("maxnreg") for options in triton.options] == [None, 72, 80]
    assert [len(compiled.calls) for compiled in triton.compiled] == [0, 0, 2]


def test_code_that_spills_with_all_registers_runs(triton: _Triton) -> None:
    triton.needed = 300
    _normalize(torch.randn(3, 8, 5), torch.ones(8))._run_on(0)
    assert len(triton.compiled[-1].calls) == 1
    assert triton.options[-1]["maxnreg"] <= 255
