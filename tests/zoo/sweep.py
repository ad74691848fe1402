"""Converts models of the zoo and counts their BatchNorm evaluations before and after."""

import copy
import dataclasses
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import bnrewrite
from tests.parity import CountEvaluations, seed
from tests.zoo.export import Exported
from tests.zoo.spec import CountOthers, Spec, may_evaluate, num_batch_norms


@dataclasses.dataclass
class Left:
    """One reason for which sites or modules stay out of graphs.

    Attributes:
        reason: what the report says, with file and line.
        num: how many of the model's skips have it.
        example: qualified name of the first of them.
    """

    reason: str
    num: int
    example: str


@dataclasses.dataclass
class Row:
    """What became of one model.

    Attributes:
        suite: the collection.
        name: the model.
        num_parameters: of the model.
        num_batch_norms: BatchNorm modules, run or not.
        num_plain: BatchNorm evaluations with batch statistics in one training forward, unconverted.
        num_others: of these, evaluations that are no sites by right.
        num_ours: evaluations by our ops, converted.
        num_escaped: evaluations by torch, converted, that are no sites by right excepted.
        num_in_graphs: sites in captured graphs.
        num_on_floor: sites that the BatchNorm module evaluates by itself.
        num_collectives: of one training forward, with more than one rank.
        convert_s: time of ``convert`` in seconds.
        left: what stays out of graphs and why.
        error: what went wrong, if anything did.
        exported: what became of the export, if it was asked for.
    """

    suite: str
    name: str
    num_parameters: int = 0
    num_batch_norms: int = 0
    num_plain: int = 0
    num_others: int = 0
    num_ours: int = 0
    num_escaped: int = 0
    num_in_graphs: int = 0
    num_on_floor: int = 0
    num_collectives: int = 0
    convert_s: float = 0.0
    left: list[Left] = dataclasses.field(default_factory=list)
    error: str | None = None
    exported: Exported | None = None

    @property
    def passes(self) -> bool:
        """Whether every evaluation that should goes through our ops."""
        return (
            self.error is None
            and self.num_escaped == 0
            and self.num_ours + self.num_others == self.num_plain
        )

    def to_dict(self) -> dict[str, Any]:
        """The row in plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Row":
        """The row that :meth:`to_dict` was called on, also after a way through JSON."""
        exported = values["exported"]
        if exported is not None:
            sizes = tuple(exported["batch_sizes"])
            exported = Exported(**{**exported, "batch_sizes": sizes})
        left = [Left(**one) for one in values["left"]]
        return cls(**{**values, "left": left, "exported": exported})


def smallest_of_each_family(specs: list[Spec], *, below: int) -> list[Spec]:
    """Of the specs of every family the one with the fewest parameters, fewest first.

    Args:
        specs: what to choose from.
        below: families whose smallest member has as many parameters or more are left out.
    """
    found: dict[str, tuple[int, Spec]] = {}
    for spec in specs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = spec.build()
        if num_batch_norms(model):
            size = sum(parameter.numel() for parameter in model.parameters())
            family = f"{spec.suite}/{spec.family or spec.name}"
            found[family] = min(
                found.get(family, (below, spec)), (size, spec), key=lambda pair: pair[0]
            )
    return [spec for size, spec in sorted(found.values(), key=lambda pair: pair[0]) if size < below]


def sweep(spec: Spec) -> Row | None:
    """The row of one model; None if nothing in it evaluates or holds BatchNorm."""
    row = Row(spec.suite, spec.name)
    try:
        with warnings.catch_warnings():
            # Libraries warn about deprecations of each other.
            warnings.simplefilter("ignore")
            return row if _measure(spec, row) else None
    except Exception as error:
        first = (str(error).strip() or "no message").split("\n", 1)[0]
        row.error = short(f"{type(error).__name__}: {first}")
        return row


class _Count(CountEvaluations):
    """Counts; on the meta device torch's own BatchNorm gives shapes only.

    There it runs as a Python decomposition, which takes most of the time of a sweep.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.native_batch_norm.default or not args[0].is_meta:
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.num_torch += bool(args[5])
        return torch.empty_like(args[0]), *(args[0].new_empty(args[0].size(1)) for _ in "mr")


def _measure(spec: Spec, row: Row) -> bool:
    seed(0)
    model = spec.build()
    if not may_evaluate(model):
        return False
    row.num_batch_norms = num_batch_norms(model)
    row.num_parameters = sum(parameter.numel() for parameter in model.parameters())
    args, kwargs = spec.call(model)
    # Some forwards write to the lists that they are given.
    again = copy.deepcopy((args, kwargs))
    with torch.no_grad(), torch.device(spec.device):
        seed(1)
        with _Count() as plain, CountOthers(model) as others:
            model(*args, **kwargs)
        if not row.num_batch_norms and not plain.num_torch:
            return False
        start = time.perf_counter()
        bnrewrite.convert(model)
        row.convert_s = round(time.perf_counter() - start, 3)
        seed(1)
        args, kwargs = again
        with _Count() as ours:
            model(*args, **kwargs)
    report = bnrewrite.report(model)
    row.num_plain = plain.num_torch
    row.num_others = others.num_calls
    row.num_ours = ours.num_ours
    row.num_escaped = ours.num_torch - others.num_calls
    row.num_in_graphs = sum(site.owner is not None for site in report.sites)
    row.num_on_floor = len(report.sites) - row.num_in_graphs
    row.num_collectives = report.collectives_forward
    row.left = list(_grouped(report))
    return True


def _grouped(report: bnrewrite.Report) -> Iterator[Left]:
    reasons = Counter[str]()
    examples: dict[str, str] = {}
    for skip in report.skipped:
        place = f" ({skip.where})" if skip.where else ""
        reason = short(skip.reason + place)
        reasons[reason] += 1
        examples.setdefault(reason, skip.name)
    for reason, num in reasons.most_common():
        yield Left(reason, num, examples[reason])


def short(text: str) -> str:
    """``text`` with paths that start at a package, so that they mean the same everywhere."""
    text = re.sub(r"(?<![\w.])/[^\s:()']*/site-packages/", "", text)
    return text.replace(f"{Path(__file__).parents[2]}/", "")
