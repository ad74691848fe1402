"""Random examples, as plain dictionaries that can be pasted into a test."""

from typing import Any

from hypothesis import strategies as st

from tests.fuzz.networks import Spec
from tests.fuzz.worker import Example

_SMOOTH = ("tanh", "silu", "gelu", "none")
_ALL = (*_SMOOTH, "relu", "relu", "relu_", "relu_", "leaky", "hardswish", "relu6", "method")

# Branches and independent sites are frequent: passes that move code are hardest there.
_INNER = (
    *["branches"] * 6, *["residual"] * 5, *["views"] * 4, *["seq"] * 3, "unit", "unit", "norm",
    "functional", "unused", "pair", "pair", "auxiliary", "teacher", "untraceable", "dense", "dense",
    "repeat", "optional", "method", "switch", "again", "chunks", "counter",
)  # fmt: skip
_LEAVES = ("conv", *["norm"] * 4, *["unit"] * 6, "act", "functional", "again")

_CHANNELS = st.integers(1, 4)


class _Draw:
    """Draws parts of one network."""

    def __init__(self, draw: Any, *, smooth: bool, pure: bool, late: bool, drops: bool) -> None:
        self.draw = draw
        self.acts = _SMOOTH if smooth else _ALL
        self.pure = pure
        self.inner = (
            *_INNER, *(["late"] * 3 if late else []), *(["dropout"] * 3 if drops else []),
            *(["reads"] if pure else []),
        )  # fmt: skip
        self.num_parts = 0

    def of(self, *values: Any) -> Any:
        """One of ``values``."""
        return self.draw(st.sampled_from(values))

    def norm(self, *, tracked: bool = False) -> Spec:
        """A BatchNorm module."""
        return {
            "cls": self.of("torch", "torch", "any", "activated", "own", "sync"),
            "affine": self.of("both", "both", "none", "no bias", "frozen"),
            "momentum": self.of(0.1, 0.3, None, 0.1),
            "track": True if tracked or self.pure else self.of(True, True, True, False),
            "eps": self.of(1e-5, 1e-3, 0.1),
            "alias": self.of(False, False, False, True),
        }

    def part(self, depth: int) -> Spec:
        """A part of a network that keeps the spatial size."""
        self.num_parts += 1
        kinds = _LEAVES if depth <= 0 or self.num_parts > 20 else self.inner
        kind = self.of(*kinds)
        spec = getattr(self, f"_{kind}", self._plain)(kind, depth - 1)
        spec["kind"] = kind
        if kind not in ("act", "again", "functional", "pair", "optional"):
            hook = self.of(None, None, None, None, None, None, None, None, "forward", "pre")
            if hook is not None:
                spec["hook"] = hook
        return spec

    def parts(self, depth: int, low: int, high: int) -> list[Spec]:
        """Several parts."""
        return [self.part(depth) for _ in range(self.draw(st.integers(low, high)))]

    def _plain(self, kind: str, depth: int) -> Spec:
        return {}

    def _conv(self, kind: str, depth: int) -> Spec:
        return {
            "out": self.draw(_CHANNELS),
            "kernel": self.of(1, 3),
            "bias": self.of(True, False),
            "standardized": self.of(False, False, False, True),
        }

    def _norm(self, kind: str, depth: int) -> Spec:
        return self.norm()

    def _act(self, kind: str, depth: int) -> Spec:
        return {"name": self.of(*self.acts)}

    def _unit(self, kind: str, depth: int) -> Spec:
        return {
            "out": self.draw(_CHANNELS),
            "norm": self.norm(),
            "act": self.of(*self.acts),
            "style": self.of("plain", "keyword", "before", "scaled"),
        }

    def _seq(self, kind: str, depth: int) -> Spec:
        return {"children": self.parts(depth, 1, 3)}

    _method = _seq

    def _residual(self, kind: str, depth: int) -> Spec:
        return {
            "body": self.part(depth),
            "shortcut": self.of(None, True) and self.part(depth),
            "act": self.of(*self.acts),
            "style": self.of("plain", "shortcut first", "inplace", "add_", "reversed", "broadcast"),
        }

    def _branches(self, kind: str, depth: int) -> Spec:
        return {
            "children": self.parts(depth, 2, 4),
            "container": self.of("list", "dict", "attributes"),
            "join": self.of("cat", "cat", "sum", "sum_", "mul", "stack"),
        }

    def _views(self, kind: str, depth: int) -> Spec:
        return {"body": self.part(depth), "join": self.of("cat", "sum", "mul", "sum_")}

    def _functional(self, kind: str, depth: int) -> Spec:
        return {
            "track": True if self.pure else self.of(True, True, False),
            "affine": self.of("both", "none"),
            "momentum": self.of(0.1, 0.4),
            "eps": self.of(1e-5, 1e-2),
            "twice": self.of(False, False, True),
            "torch_call": self.of(False, False, True),
        }

    def _with_norm(self, kind: str, depth: int) -> Spec:
        return {
            "norm": self.norm(tracked=kind == "reads"),
            "body": self.part(depth),
            "first": self.of(True, False),
            "style": self.of("none", "keywords", "position"),
            "out": self.draw(_CHANNELS),
        }

    _unused = _untraceable = _optional = _late = _reads = _chunks = _counter = _with_norm

    def _two(self, kind: str, depth: int) -> Spec:
        return {
            "children": self.parts(depth, 2, 2),
            "join": self.of("cat", "sum", "mul"),
            "as_dict": self.of(True, False),
        }

    _pair = _auxiliary = _teacher = _switch = _two

    def _dense(self, kind: str, depth: int) -> Spec:
        return {"children": self.parts(depth, 1, 3)}

    def _repeat(self, kind: str, depth: int) -> Spec:
        return {"body": self.part(depth), "num": self.of(2, 3)}

    def _again(self, kind: str, depth: int) -> Spec:
        return {"index": self.draw(st.integers(0, 5))}


@st.composite
def examples(draw: Any, max_ranks: int = 4) -> Example:
    """A network, the ranks it runs on, and the steps they take."""
    world_size = draw(st.sampled_from([n for n in (2, 2, 2, 3, 4, 1) if n <= max_ranks]))
    dtype = draw(st.sampled_from(["float64"] * 8 + ["float32", "bfloat16"]))
    modes = draw(
        st.sampled_from(
            [["sync"]] * 14
            + [[mode] for mode in ("local", "ring", "detach", "group", "random", "frozen")]
            + [["sync", "local"], ["sync", "sync", "ring"], ["frozen", "sync"],
               ["sync", "unmatched"], ["random group", "sync", "local"]]
        )
    )  # fmt: skip
    partitions = _PARTITIONS.get(world_size, [None])
    groups = draw(st.sampled_from([None, None, None, *partitions]))
    pure = modes == ["sync"] and groups is None and world_size > 1
    pure = pure and draw(st.booleans())
    late = draw(st.sampled_from([False] * 7 + [True]))
    drops = draw(st.sampled_from([False] * 9 + [True]))
    smooth = dtype != "float64"
    parts = _Draw(draw, smooth=smooth, pure=pure, late=late, drops=drops)
    num_dims = draw(st.sampled_from([0, 1, 2, 2, 2, 3]))
    depth = 1 if dtype == "bfloat16" else draw(st.sampled_from([1, 2, 2, 3]))
    trunk = {"kind": "seq", "children": parts.parts(depth, 1, 3)}
    head = parts.part(1) if draw(st.booleans()) else None
    net = {
        "seed": draw(st.integers(0, 99)),
        "num_dims": num_dims,
        "num_in": draw(_CHANNELS),
        "space": [draw(st.integers(1, 3)) for _ in range(num_dims)],
        "trunk": trunk,
        "neck": parts.norm(),
        "head": head,
        "outputs": draw(st.sampled_from(["plain", "tuple", "dict"])),
    }
    local = not pure and (world_size == 1 or groups is not None or modes != ["sync"])
    local = local or "'track': False" in str(net)
    sizes = _sizes(draw, world_size, local=local, empty="unmatched" not in modes)
    # A random schedule without a counter follows a digest, which only the ops know.
    track = not pure and "random" not in str(modes)
    steps = [_step(draw, sizes(), late=late, track=track) for _ in range(draw(st.integers(1, 3)))]
    evaluates = "frozen" in modes or any(
        step["kind"] == "eval" or "eval" in str(step["changes"]) for step in steps
    )
    strided = draw(st.sampled_from([False, False, False, True]))
    if evaluates and num_dims > 1:
        # Evaluation is torch's own op, whose backward on the CPU errs in such layouts: see
        # test_layouts_in_which_torch_computes_a_wrong_gradient.
        strided = False
        _forget(net, "standardized")
    return {
        "net": net,
        "dtype": dtype,
        "modes": modes,
        "groups": groups,
        "channels_last": draw(st.sampled_from([False, False, True])),
        "strided": strided,
        "x_grad": draw(st.sampled_from([True, True, False])),
        "how": draw(
            st.sampled_from(["once"] * 4 + ["twice", "copied", "pickled", "replace", "reverted"])
        ),
        "subset": draw(st.integers(0, 15)),
        "steps": steps,
    }


_PARTITIONS: dict[int, list[list[list[int]]]] = {
    2: [[[0, 1]]],
    3: [[[0, 2], [1]], [[0, 1, 2]]],
    4: [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[1, 2, 3], [0]]],
}


def _forget(spec: Any, option: str) -> None:
    """Sets an option of all parts to False."""
    if isinstance(spec, dict):
        if option in spec:
            spec[option] = False
        spec = list(spec.values())
    for part in spec if isinstance(spec, list) else ():
        _forget(part, option)


def _sizes(draw: Any, world_size: int, *, local: bool, empty: bool) -> Any:
    """Batch sizes of the ranks; where ranks are on their own, one value is too few."""
    counts = [2, 2, 3, 4] if local else [2, 1, 3, 4]
    counts += [0] if empty else []

    def sizes() -> list[int]:
        values = [draw(st.sampled_from(counts)) for _ in range(world_size)]
        if sum(values) < 2 and not (sum(values) == 0 and draw(st.sampled_from([False, True]))):
            values[0] = 2
        return values

    return sizes


def _step(draw: Any, sizes: list[int], *, late: bool, track: bool) -> dict[str, Any]:
    kinds = ["nograd", "nograd", "eval"] if late else ["train"] * 6 + ["eval", "nograd", "penalty"]
    kind = draw(st.sampled_from(kinds))
    changes = []
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        what = draw(
            st.sampled_from(
                ["eval", "momentum", "eps", "weight", "switch", *(["track"] if track else [])]
            )
        )
        values = {"momentum": [0.2, 1.0, 0.0], "eps": [1e-4, 0.5]}.get(what, [True, False])
        changes.append([what, draw(st.integers(0, 5)), draw(st.sampled_from(values))])
    return {
        "kind": kind,
        "grad": not late and draw(st.booleans()),
        "sizes": sizes,
        "update": draw(st.sampled_from([True, True, False])),
        "changes": changes,
    }
