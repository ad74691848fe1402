"""``python -m tests.zoo``: converts every model of the zoo, counts, and prints a table."""

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.zoo.spec import MissingPackage, Spec
from tests.zoo.suites import SUITES, specs_of
from tests.zoo.sweep import Row, sweep

_PACKAGES = ("torch", "torchvision", "timm", "transformers", "segmentation-models-pytorch")
_COLUMNS = (
    ("layers", "num_batch_norms"),
    ("plain", "num_plain"),
    ("others", "num_others"),
    ("ours", "num_ours"),
    ("escaped", "num_escaped"),
    ("in graphs", "num_in_graphs"),
    ("on floor", "num_on_floor"),
    ("rounds", "num_collectives"),
)


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; 0 if nothing escaped and nothing failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo",
        description="Converts models and counts BatchNorm evaluations of one training forward: "
        "of the plain model (others: weight standardisation and InstanceNorm, which are no sites), "
        "through our ops, and escaped. Models without BatchNorm are left out.",
    )
    parser.add_argument("--suite", action="append", choices=SUITES, help="default: all of them")
    parser.add_argument("--name", default="*", help="pattern of model names, default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    specs: list[Spec] = []
    missing: dict[str, str] = {}
    for suite in options.suite or SUITES:
        try:
            specs += [
                one for name, one in specs_of(suite).items() if fnmatch.fnmatch(name, options.name)
            ]
        except MissingPackage as error:
            missing[suite] = str(error)
            print(f"{suite} is left out: {error}", file=sys.stderr)
    rows: list[Row] = []
    conditions = _conditions(argv)
    print(_header())
    for row in _sweep_all(specs):
        rows.append(row)
        tqdm.write(_line(row))
    summary = _summary(rows)
    print("\n" + "\n".join(f"{key}: {value}" for key, value in summary.items()))
    if options.json is not None:
        result = {"conditions": conditions, "missing": missing, "summary": summary}
        result["rows"] = [row.to_dict() for row in rows]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(_compact(result), encoding="utf-8")
    return 0 if rows and all(row.passes for row in rows) else 1


def _sweep_all(specs: list[Spec]) -> Iterator[Row]:
    progress = tqdm(specs, unit="model")
    for spec in progress:
        progress.set_postfix_str(str(spec), refresh=False)
        row = sweep(spec)
        if row is not None:
            yield row


def _header() -> str:
    return f"{'model':52}" + "".join(f"{title:>10}" for title, _ in _COLUMNS) + f"{'convert':>10}"


def _line(row: Row) -> str:
    text = f"{f'{row.suite}/{row.name}':52}"
    text += "".join(f"{getattr(row, field):>10}" for _, field in _COLUMNS)
    text += f"{row.convert_s:>8.2f} s"
    if row.error is not None:
        text += f"\n    ERROR {row.error}"
    elif not row.passes:
        text += "\n    ESCAPED"
    return text + "".join(
        f"\n    left {left.num} x: {left.reason}, first {left.example}" for left in row.left
    )


def _summary(rows: list[Row]) -> dict[str, Any]:
    """Sums over all models, by suite and in total."""
    summary: dict[str, Any] = {}
    for suite in [*dict.fromkeys(row.suite for row in rows), "all"]:
        of_suite = [row for row in rows if suite in (row.suite, "all")]
        summary[suite] = {
            "models": len(of_suite),
            "models with BatchNorm layers": sum(row.num_batch_norms > 0 for row in of_suite),
            "errors": sum(row.error is not None for row in of_suite),
            "evaluations": sum(row.num_plain - row.num_others for row in of_suite),
            "through our ops": sum(row.num_ours for row in of_suite),
            "escaped": sum(row.num_escaped for row in of_suite),
            "no sites by right": sum(row.num_others for row in of_suite),
            "sites in graphs": sum(row.num_in_graphs for row in of_suite),
            "sites on the floor": sum(row.num_on_floor for row in of_suite),
            "slowest convert": max((row.convert_s for row in of_suite), default=0.0),
        }
    return summary


def _conditions(argv: list[str] | None) -> dict[str, Any]:
    words = sys.argv[1:] if argv is None else argv
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": " ".join(["python -m tests.zoo", *words]),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread",
        "python": platform.python_version(),
        **versions,
    }


def _compact(result: dict[str, Any]) -> str:
    """JSON with one line per model, which a diff can show."""
    rows = ",\n".join("  " + json.dumps(row) for row in result.pop("rows"))
    head = json.dumps(result, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
