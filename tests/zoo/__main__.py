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
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.zoo.export import export
from tests.zoo.spec import MissingPackage, Spec
from tests.zoo.suites import SUITES, specs_of
from tests.zoo.sweep import Row, smallest_of_each_family, sweep

_PACKAGES = ("torch", "torchvision", "timm", "transformers", "segmentation-models-pytorch")
_DOMAIN_PACKAGES = (
    *("ultralytics", "monai", "dynamic-network-architectures", "pytorchvideo", "lightly"),
    *("open_clip_torch", "torch_geometric", "python-doctr"),
)
_EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
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
    """Runs the sweep; 0 if nothing escaped and no conversion failed."""
    options = _options(argv)
    torch.set_num_threads(1)
    specs, missing = _specs(options.suite or SUITES, options.name)
    words = sys.argv[1:] if argv is None else argv
    command = " ".join(["python -m tests.zoo", *words])
    origin: dict[str, Any] = {"conditions": conditions(command), "missing": missing}
    rows: list[Row] = []
    if options.resume and options.json.exists():
        rows, origin["earlier conditions"] = _stored(options.json)
        specs = _not_done(specs, rows, families=options.one_per_family)
    if options.one_per_family:
        specs = smallest_of_each_family(specs, below=10**8)
    print(_header(), flush=True)
    late = None if options.minutes is None else time.process_time() + 60 * options.minutes
    for row, rest in _sweep_all(specs, late, with_export=options.export):
        if row is not None:
            rows.append(row)
            tqdm.write(_line(row))
            sys.stdout.flush()
        if options.json is not None and (row is not None or not rest):
            # After each row, so that a sweep that is broken off leaves what it found; and after the
            # last model, which may have no BatchNorm.
            _store(options.json, origin, rows, rest)
    print("\n" + "\n".join(f"{key}: {value}" for key, value in _summary(rows).items()))
    return 0 if rows and all(row.passes for row in rows) else 1


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo",
        description="Converts models and counts BatchNorm evaluations of one training forward: "
        "of the plain model (others: weight standardization and InstanceNorm, which are no sites), "
        "through our ops, and escaped. Models without BatchNorm are left out.",
    )
    parser.add_argument("--suite", action="append", choices=SUITES, help="default: all of them")
    parser.add_argument("--name", default="*", help="pattern of model names, default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument(
        "--export",
        action="store_true",
        help="export each model to ONNX as well, kept and folded, and compare in onnxruntime",
    )
    parser.add_argument(
        "--one-per-family",
        action="store_true",
        help="only the smallest model of each family, of fewer than 100 million parameters",
    )
    parser.add_argument("--minutes", type=float, help="start no model after this much CPU time")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that --json FILE holds already, and leave out their models (their "
        "families, with --one-per-family)",
    )
    options = parser.parse_args(argv)
    if options.resume and options.json is None:
        parser.error("--resume needs --json FILE, whose rows it keeps")
    return options


def _specs(suites: Iterable[str], pattern: str) -> tuple[list[Spec], dict[str, str]]:
    """The models asked for, and the collections that are not installed with the reason."""
    specs: list[Spec] = []
    missing: dict[str, str] = {}
    for suite in suites:
        try:
            found = specs_of(suite)
        except MissingPackage as error:
            missing[suite] = str(error)
            print(f"{suite} is left out: {error}", file=sys.stderr)
            continue
        specs += [spec for name, spec in found.items() if fnmatch.fnmatch(name, pattern)]
    return specs, missing


def _stored(path: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows that an earlier sweep wrote, and the conditions of all sweeps that wrote some."""
    found = json.loads(path.read_text("utf-8"))
    rows = [Row.from_dict(row) for row in found["rows"]]
    return rows, [*found.get("earlier conditions", ()), found["conditions"]]


def _not_done(specs: list[Spec], rows: list[Row], *, families: bool) -> list[Spec]:
    """The specs without a row, or those of families of which no model has a row."""

    def key(spec: Spec) -> str:
        return f"{spec.suite}/{spec.family or spec.name}" if families else str(spec)

    names = {f"{row.suite}/{row.name}" for row in rows}
    done = {key(spec) for spec in specs if str(spec) in names}
    return [spec for spec in specs if key(spec) not in done]


def _store(path: Path, result: dict[str, Any], rows: list[Row], rest: list[str]) -> None:
    """Writes the rows with their summary, and the models that the sweep has not come to."""
    result = {**result, "summary": _summary(rows), "not begun": rest}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.new")
    written.write_text(compact({**result, "rows": [row.to_dict() for row in rows]}), "utf-8")
    # In one step, so that a sweep that is killed here loses nothing either.
    written.replace(path)


def _sweep_all(
    specs: list[Spec], late: float | None, *, with_export: bool
) -> Iterator[tuple[Row | None, list[str]]]:
    """The row of each model, None without BatchNorm, and the names of those not begun."""
    progress = tqdm(specs, unit="model")
    for index, spec in enumerate(progress):
        if late is not None and time.process_time() > late:
            return
        progress.set_postfix_str(str(spec), refresh=False)
        row = sweep(spec)
        if row is not None and with_export:
            row.exported = export(spec)
        yield row, [str(one) for one in specs[index + 1 :]]


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
    if row.exported is not None:
        text += f"\n    {row.exported}"
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
        exported = [row.exported for row in of_suite if row.exported is not None]
        if exported:
            summary[suite] |= {
                "exports, kept and folded": len(exported),
                "exports without an error": sum(not one.error for one in exported),
                "of these, on one batch size only": sum(
                    not one.error and not one.passes for one in exported
                ),
                "BatchNormalization nodes kept": sum(one.num_kept for one in exported),
                "of these, folded": sum(one.num_folded for one in exported),
                "largest difference": max(
                    (
                        max(one.kept_difference or 0.0, one.folded_difference or 0.0)
                        for one in exported
                    ),
                    default=0.0,
                ),
            }
    return summary


def conditions(command: str) -> dict[str, Any]:
    """What a result depends on: command, commit, date, hardware and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    versions = {}
    for package in (*_PACKAGES, *_DOMAIN_PACKAGES, *_EXPORT_PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package not in _DOMAIN_PACKAGES:
                versions[package] = None
    return {
        "command": command,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread",
        "python": platform.python_version(),
        **versions,
    }


def compact(result: dict[str, Any]) -> str:
    """JSON with one line per model, which a diff can show."""
    rows = ",\n".join("  " + json.dumps(row) for row in result.pop("rows"))
    head = json.dumps(result, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
