"""One launch of a kernel, as cheap for the host as Triton allows."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnrewrite import reference
from bnrewrite.kernels.triton.plan import Plan

T = TypeVar("T")

MOST_REGISTERS = 255
"""Of a thread, on every GPU that Triton compiles for with ptxas."""

_UNIT = 8
"""Registers that a thread gets more or less of at a time."""

_ACC: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.float64: tl.float64}


@functools.cache
def _target(device: int) -> str:
    """What a GPU does that a kernel takes into account; "" if there is nothing.

    "early": kernels may start while the one before ends, for which they then wait themselves. That
    hides a launch: CUDA calls it programmatic dependent launch. They wait before they touch memory,
    for all that the stream has done; and until all programs of the kernel before have ended, or
    said that they need no more room, none of ours takes any.

    "cdna": stores are not done at a barrier, see ``_wait_for_stores`` in ``tiles.py``.
    """
    if device < 0 or triton.knobs.runtime.interpret:
        return ""
    if torch.version.hip is not None:
        is_cdna = torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9")
        return "cdna" if is_cdna else ""
    return "early" if torch.cuda.get_device_capability(device) >= (9, 0) else ""


class Launch(NamedTuple):
    """One launch of one kernel.

    Attributes:
        kernel: the kernel.
        grid: programs per dimension.
        tensors: the first arguments, on one device; None where one is absent.
        numbers: the arguments behind them.
        plan: how the first tensor is cut.
        more: names and values, in turn, of the constants that do not follow from it.
        num_warps: warps of a program.
        most_registers: of a thread, which it gets if it needs them, however few programs then run
            at a time. With 0 ptxas weighs one against the other, and may have loads wait for each
            other. None are spilled, whatever is given: see :meth:`without_spills`.
    """

    kernel: Any
    grid: tuple[int, int, int]
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]
    plan: Plan
    more: tuple[Any, ...]
    num_warps: int
    most_registers: int = 0

    @property
    def x(self) -> Tensor:
        """The first tensor."""
        assert self.tensors[0] is not None
        return self.tensors[0]

    @property
    def args(self) -> tuple[Any, ...]:
        """Values of the arguments that are no constants, in order."""
        return self.tensors + self.numbers

    @property
    def constants(self) -> dict[str, Any]:
        """Values of the arguments that are constants."""
        return {
            **self.plan.constants,
            "ACC": _ACC[reference.accumulate_dtype(self.x.dtype)],
            "TARGET": _target(self.x.get_device()),
            **dict(zip(self.more[::2], self.more[1::2], strict=True)),
        }

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told besides; multiply-adds are wanted whatever its default is."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if self.most_registers and torch.version.hip is None:
            options["maxnreg"] = self.most_registers
        if _target(self.x.get_device()) == "early":
            options["launch_pdl"] = True
        return options

    def run(self) -> None:
        """Launches on the device of the first argument, without waiting."""
        device = self.x.get_device()
        # On AMD the code depends on the size of the memory, too.
        if device < 0 or torch.version.hip is not None:
            # The interpreter, or the runtime of Triton.
            self._run_by_triton(device)
        elif device == torch._C._cuda_getDevice():
            self._run_on(device)
        else:
            with torch.cuda.device(device):
                self._run_on(device)

    def _run_by_triton(self, device: int) -> None:
        with torch.cuda.device(device):
            self.kernel[self.grid](*self.args, **self.constants, **self.options)

    def _run_on(self, device: int) -> None:
        # Triton takes longer to find the code of known arguments than the device to run it, and
        # longer to find the address of a tensor than to take a number for one.
        addresses = [None if t is None else t.data_ptr() for t in self.tensors]
        variant = self._variant(device, addresses)
        found = _COMPILED.get(variant)
        if found is None:
            if triton.knobs.runtime.interpret:
                # On a GPU, too, there is nothing to compile.
                self._run_by_triton(device)
                return
            found = _COMPILED[variant] = self._compiled()
        compiled, values = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled[self.grid](*addresses, *self.numbers, *values, stream=stream)

    def _compiled(self) -> tuple[Any, tuple[Any, ...]]:
        """The code for the current device, and the constants that it is called with, too."""

        def make(one: Launch) -> tuple[Any, int, int]:
            made = one.kernel.warmup(*one.args, grid=one.grid, **one.constants, **one.options)
            # The driver tells how many registers there are when it loads the code for a launch.
            _ = made[one.grid]
            return made, made.n_regs, made.n_spills

        constants = self.constants
        names = self.kernel.arg_names[len(self.args) :]
        return self.without_spills(make), tuple([constants[name] for name in names])

    def without_spills(self, make: Callable[["Launch"], tuple[T, int, int]]) -> T:
        """The code for this launch, with as many registers as ptxas needs not to spill any.

        Left to choose, it may spill some bytes to have one more program run at a time.

        Args:
            make: compiles a launch; gives the code, its registers and how much of them it spills.
        """
        made, registers, spills = make(self)
        while spills and registers + _UNIT <= MOST_REGISTERS:
            registers += _UNIT
            made, _, spills = make(self._replace(most_registers=registers))
        return made

    def _variant(self, device: int, addresses: Sequence[int | None]) -> Hashable:
        """What decides about the code of the kernel: all but sizes, other numbers and addresses.

        As Triton specializes code: on absent arguments, dtypes, and whether an address is a
        multiple of 16. The kernels' annotations keep it from doing so on numbers.
        """
        return (
            device,
            self.kernel.__name__,
            self.plan.cut,
            self.more,
            self.num_warps,
            self.most_registers,
            *[
                None if t is None else t.dtype if not address & 15 else (t.dtype, "odd")  # pyright: ignore[reportOptionalOperand]
                for t, address in zip(self.tensors, addresses, strict=True)
            ],
        )


_COMPILED: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}
"""Kernels that were launched, with the constants that they are called with, too."""
