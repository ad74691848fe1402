"""The Triton kernels as compilers see them: resources, width of accesses; and how work is cut."""

import dataclasses
import itertools
import re
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bnrewrite import reference
from bnrewrite.activations import ACTIVATIONS
from bnrewrite.kernels.triton.plan import Plan, layout_of, plan, plan_of

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from bnrewrite.kernels.triton import launch
from bnrewrite.kernels.triton.launcher import Launch

TARGETS = [80, 90, 100]
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of a launch: registers, bytes of stack for others, memory accesses."""

    registers: int
    stack: int
    accesses: frozenset[str]


def _made(one: Launch, kind: str, target: GPUTarget, **options: Any) -> Any:
    names = one.kernel.arg_names
    annotated = {parameter.name: parameter.annotation_type for parameter in one.kernel.params}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {**one.constants, "TARGET": kind}
    attributes: dict[tuple[int, ...], list] = {}
    for index, (name, value) in enumerate(zip(names, one.args, strict=False)):
        if value is None:
            constants[name] = None
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = annotated[name]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=one.kernel,
        signature={name: signature[name] for name in names},
        constexprs=constants,
        attrs=attributes,
    )
    return triton.compile(source, target=target, options={**one.options, **options})


def _compile(one: Launch, target: int, folder: Path) -> Compiled:
    early = target >= 90
    gpu = GPUTarget("cuda", target, 32)
    made = _made(one, "early" if early else "", gpu, launch_pdl=early)
    code = folder / "kernel.cubin"
    code.write_bytes(made.asm["cubin"])
    report = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", code],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert used, report
    accesses = re.findall(r"(?:ld|st)\.global[\w.:]*", made.asm["ptx"])
    # What is loaded ahead of its use goes to shared memory first.
    if re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10\b", made.asm["ptx"]):
        accesses.append("ld.ahead.v4.b32")
    return Compiled(int(used[1]), int(used[2]), frozenset(accesses))


@dataclasses.dataclass(frozen=True)
class Variant:
    """What decides about the code of a kernel."""

    shape: tuple[int, ...]
    last: bool
    dtype: torch.dtype
    activation: str
    residual: bool
    affine: bool = True
    momentum: float | None = 0.1
    tracks: bool = True

    def __str__(self) -> str:
        words = [
            "x".join(map(str, self.shape)),
            "last" if self.last else "contiguous",
            str(self.dtype).removeprefix("torch."),
            self.activation,
            "residual" if self.residual else "alone",
        ]
        words += [] if self.affine else ["plain"]
        words += [] if self.tracks else ["untracked"]
        return "-".join(words if self.momentum is not None else [*words, "cumulative"])

    def launches(self) -> list[Launch]:
        """All kernels in this variant, on tensors without memory."""
        x = torch.empty(self.shape, dtype=self.dtype, device="meta")
        if self.last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        C = x.size(1)
        cut, once, twice, thrice = (plan_of(x, reads=reads) for reads in range(4))
        assert cut is not None
        assert once is not None
        assert twice is not None
        assert thrice is not None
        acc = reference.accumulate_dtype(self.dtype)
        totals, sums = x.new_empty((2, 2 * C + 1), dtype=torch.float64)
        stats = x.new_empty((2, C), dtype=acc)
        one = x.new_empty(C, dtype=acc)
        affine = (one, one) if self.affine else (None, None)
        moved = (one, one, x.new_empty((), dtype=torch.int64)) if self.tracks else (None,) * 3
        momentum = self.momentum
        own = launch.Normalized(
            (totals, *affine, stats, *moved), (1e-5, momentum or 0.0), momentum is None
        )
        reduced = launch.Reduced(x, stats, *affine, sums, one if self.tracks else None)
        applied = launch.Applied(x, x, stats, totals, *affine, sums)
        kept = x if self.residual else None
        act = (self.activation, 0.1)
        return [
            launch.moments(once, x, totals),
            launch.normalize(cut, x, kept, x, None, own, None, *act),
            # Of an empty batch.
            launch.normalize(None, x, kept, x, None, own, None, *act),
            launch.normalize_backward_reduce(twice, x, reduced, None, kept, kept, *act),
            launch.normalize_backward(cut, x, applied, None, kept, *act),
            *(self._of_sums(cut, thrice, x, own, reduced, applied) if self.residual else []),
        ]

    def _of_sums(
        self,
        cut: Plan,
        thrice: Plan,
        x: Tensor,
        own: launch.Normalized,
        reduced: launch.Reduced,
        applied: launch.Applied,
    ) -> list[Launch]:
        """The forward that keeps the sum, and two branches."""
        act = (self.activation, 0.1)
        return [
            launch.normalize(cut, x, x, x, x, own, None, *act),
            launch.normalize(cut, x, x, x, None, own, own, *act),
            launch.normalize_backward_reduce(thrice, x, reduced, reduced, None, None, *act),
            launch.normalize_backward(cut, x, applied, applied, None, *act),
        ]


BASIC = [
    Variant((32, 64, 56, 56), False, torch.float32, "relu", True),
    Variant((32, 3, 224, 224), True, torch.float64, "identity", True),
    Variant((32, 512, 7, 7), False, torch.float32, "gelu", True),
    Variant((32, 58, 56, 56), True, torch.float16, "gelu", True),
    # Every argument that may be missing is.
    Variant((32, 2048), False, torch.float16, "relu", False, affine=False, tracks=False),
]
"""Of each layout and way to cut it, those that need most registers; for every target."""

QUICK = [
    *BASIC,
    Variant((32, 64, 56, 56), True, torch.bfloat16, "gelu", False),
    Variant((32, 2048, 7, 7), False, torch.bfloat16, "relu", True),
    Variant((32, 256, 14, 14), False, torch.float16, "relu", True),
    Variant((128, 64, 56, 56), True, torch.float16, "relu", False),
    Variant((32, 64, 2050), False, torch.float32, "gelu", True),
    # Rows that start unevenly, folded or not.
    Variant((8, 18, 128, 128), True, torch.bfloat16, "relu", True),
    Variant((64, 3, 224, 224), True, torch.float32, "relu", True),
    Variant((2, 270, 128, 256), True, torch.float32, "relu", True),
    Variant((2, 7, 4, 4), True, torch.bfloat16, "relu", True),
]
ALL = [
    Variant(shape, last, dtype, activation, residual)
    for shape, last, dtype, activation, residual in itertools.product(
        [
            (32, 64, 56, 56),
            (32, 2048, 7, 7),
            (32, 512, 7, 7),
            (32, 3, 224, 224),
            (16, 128, 14, 14),
            (128, 64, 112, 112),
            (2, 270, 128, 256),
            (2, 18, 512, 1024),
            (32, 58, 56, 56),
            (16, 2047, 8, 8),
        ],
        [False, True],
        [torch.float16, torch.bfloat16, torch.float32, torch.float64],
        ACTIVATIONS,
        [False, True],
    )
] + [
    *QUICK,
    Variant((32, 2048), False, torch.float32, "identity", False),
    Variant((32, 64, 56, 56), False, torch.float32, "identity", False, affine=False),
    Variant((32, 8192, 4), False, torch.float16, "silu", True, momentum=None),
]


class TestCompiled:
    """Nothing spills, and memory is accessed 16 bytes at a time where the sizes allow it."""

    @pytest.mark.parametrize("variant", BASIC, ids=str)
    @pytest.mark.parametrize("target", TARGETS, ids="sm_{}".format)
    def test_basic_variants(self, variant: Variant, target: int, tmp_path: Path) -> None:
        _check(variant, target, tmp_path)

    @pytest.mark.parametrize("variant", QUICK[len(BASIC) :], ids=str)
    def test_common_variants(self, variant: Variant, tmp_path: Path) -> None:
        _check(variant, 90, tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", dict.fromkeys(ALL), ids=str)
    @pytest.mark.parametrize("target", TARGETS, ids="sm_{}".format)
    def test_every_variant(self, variant: Variant, target: int, tmp_path: Path) -> None:
        _check(variant, target, tmp_path)


def _without_spills(one: Launch, target: int, folder: Path) -> Compiled:
    def make(one: Launch) -> tuple[Compiled, int, int]:
        made = _compile(one, target, folder)
        return made, made.registers, made.stack

    return one.without_spills(make)


def _check(variant: Variant, target: int, folder: Path) -> None:
    itemsize = variant.dtype.itemsize
    along = variant.shape[1] if variant.last else torch.Size(variant.shape[2:]).numel()
    for one in variant.launches():
        made = _without_spills(one, target, folder)
        name = one.kernel.__name__
        assert made.stack == 0, f"{name} spills: {made}"
        assert made.registers <= 255
        of_a_thread = one.constants["BLOCK_C"] * one.constants["BLOCK_S"] // (32 * one.num_warps)
        if (along * itemsize % 16 and not one.plan.tile.has_parts) or of_a_thread * itemsize < 16:
            continue
        wide = ("v4.b32", "v2.b64")
        assert any(a.startswith("ld.") and a.endswith(wide) for a in made.accesses), (name, made)
        if name in ("normalize_kernel", "normalize_backward_kernel"):
            assert any(a.startswith("st.") and a.endswith(wide) for a in made.accesses), name


class _Driver:
    """What the runtime of Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="other tests launch there")
@pytest.mark.parametrize("variant", BASIC, ids=str)
def test_the_runtime_takes_every_launch(variant: Variant) -> None:
    """All of :meth:`Launch.run` but the launch itself."""
    with mock.patch.object(driver, "_active", _Driver()):
        for one in variant.launches():
            made = one.kernel.warmup(*one.args, grid=one.grid, **one.constants, **one.options)
            types = made.src.signature
            for name in {"eps", "momentum", "slope"}.intersection(types):
                assert types[name] == "fp64"
            assert types["N"] == types["C"] == types["S"] == "i64"
            assert made.metadata.num_warps == one.num_warps


@pytest.mark.skipif(torch.cuda.is_available(), reason="other tests launch there")
def test_threads_agree_on_a_counter() -> None:
    """All threads load it and one stores it, of two sites that may share it."""
    variant = Variant((32, 64, 56, 56), False, torch.float32, "relu", True, momentum=None)
    (one,) = [
        one
        for one in variant.launches()
        if one.kernel.__name__ == "normalize_kernel"
        and one.tensors[one.kernel.arg_names.index("other_totals")] is not None
    ]
    with mock.patch.object(driver, "_active", _Driver()):
        made = one.kernel.warmup(*one.args, grid=one.grid, **one.constants, **one.options)
    between = re.split(r"st\.global\.b64", made.asm["ptx"])
    assert len(between) == 3
    for before in between[:2]:
        assert "bar.sync" in before.rpartition("st.global.b32")[2]
    # The count of values.
    assert between[1].partition("bar.sync")[0].count("ld.global.b64") == 1


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950"])
def test_every_wave_has_stored_before_one_announces_it(arch: str) -> None:
    """On AMD's CDNA, whose barriers do not wait for stores. None of these GPUs was at hand."""
    target = GPUTarget("hip", arch, 64)
    variant = Variant((4096, 512, 4, 4), False, torch.float32, "relu", True)
    found = 0
    for one in variant.launches():
        if "reduce" not in one.kernel.__name__ and one.kernel.__name__ != "moments_kernel":
            continue
        assert one.constants["MERGE"]
        made = _made(one._replace(most_registers=0), "cdna", target)
        before, _, _ = made.asm["amdgcn"].partition("global_atomic_add")
        # The store of sums, the barrier behind it, and what is between them.
        _, store, after = before.rpartition("global_store_dwordx")
        assert store
        until, barrier, _ = after.partition("s_barrier")
        assert barrier
        assert "s_waitcnt vmcnt(0)" in until, one.kernel.__name__
        found += 1
    assert found == 3


class TestPlan:
    """How tensors are cut into tiles and programs."""

    @pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
    @pytest.mark.parametrize("itemsize", [2, 4, 8])
    @pytest.mark.parametrize("C", [1, 3, 18, 58, 64, 270, 1000, 8192])
    @pytest.mark.parametrize("S", [1, 2, 49, 196, 3136, 50176, 1 << 22])
    def test_tiles_cover_everything_once(self, S: int, C: int, itemsize: int, last: bool) -> None:
        for reads in range(4):
            cut = plan(7, C, S, itemsize, last, reads)
            assert cut is not None
            tile = cut.tile
            is_whole = cut.num_splits == 1 and reads > 0 and not last
            most = 16384 if is_whole or reads == 1 else 8192
            assert tile.BLOCK_C * tile.BLOCK_S * itemsize <= most
            width = tile.GROUP * tile.P or tile.BLOCK_C
            assert (cut.num_blocks - 1) * width < C * tile.P <= cut.num_blocks * width
            assert width <= tile.BLOCK_C
            per_image, images = -(-tile.S // tile.SPAN), tile.BLOCK_S // tile.SPAN
            assert cut.num_tiles == -(-tile.N // images) * per_image
            assert (per_image - 1) * tile.SPAN < tile.S <= per_image * tile.SPAN
            assert images == 1 or (images < 2 * tile.N and not tile.LAST)
            assert tile.N * tile.S * tile.P == 7 * S
            N, units_c, units_s, columns = cut.sizes
            units = 1 if tile.has_parts else tile.VEC
            assert N * units_c * units_s * columns * units == 7 * C * S
            assert 1 <= cut.num_splits <= min(cut.num_tiles, 65535)
            if reads and cut.num_splits > 1:
                # As many as 132 multiprocessors run at a time.
                assert cut.num_blocks * cut.num_splits <= 2 * 132
            name, merge, *_ = cut.of_sums
            assert name == "MERGE"
            assert (merge > 0) == (cut.num_splits > 1 or tile.FOLD)

    @pytest.mark.parametrize(
        ("N", "C", "S", "last"),
        [
            (64, 64, 112 * 112, False),
            (32, 4, 224 * 224, False),
            (32, 4, 224 * 224, True),
            (2, 16, 128**3, False),
            (128, 1, 224 * 224, False),
        ],
    )
    def test_few_channels_fill_a_device(self, N: int, C: int, S: int, last: bool) -> None:
        cut = plan(N, C, S, 4, last, reads=1)
        assert cut is not None
        assert cut.num_blocks * cut.num_splits >= 200

    def test_sizes_beyond_32_bits_are_planned_or_refused(self) -> None:
        assert plan(1 << 12, 64, 1 << 16, 2, False) is not None
        assert plan(1 << 12, 64, 1 << 16, 2, True) is not None
        assert plan(1, 1, 1 << 33, 2, False) is not None
        assert plan(64, 1 << 28, 1, 2, True) is None

    @pytest.mark.parametrize("reads", range(4))
    def test_numbers_of_tiles_stay_below_32_bits(self, reads: int) -> None:
        """Those behind the last one, too, by as many steps as tiles are on their way."""
        for N in ((1 << 30) - 1, (1 << 31) - 1):
            cut = plan(N, 1, 2, 2, False, reads)
            assert cut is None or cut.num_tiles + cut.STAGES * cut.num_splits < 1 << 31

    def test_layouts(self) -> None:
        x = torch.empty(2, 3, 4, 5)
        assert layout_of(x) is False
        assert layout_of(x.contiguous(memory_format=torch.channels_last)) is True
        assert layout_of(x.flatten(2).transpose(0, 1).contiguous().transpose(0, 1)) is None
        assert layout_of(torch.empty(4, 3)) is True
        assert layout_of(torch.empty(4, 3, 1)) is True
        assert layout_of(torch.empty(4, 5, 3).transpose(1, 2)) is True
        assert layout_of(x[:, :, ::2]) is None
