"""``python -m tests.zoo.export_table FILE.json``: the exports of a sweep as FILE.md, for people.

The sweep is ``python -m tests.zoo --export --json FILE.json``.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.zoo.export import Exported
from tests.zoo.sweep import Row

_TITLES = ("model", "kept", "folded", "from the batch", "difference, kept", "difference, folded")

_INTRODUCTION = """# Exports of the zoo

Each model was converted, in training mode, exported in the kept and in the folded form with dynamic
batch, and compared with the model in onnxruntime on two batch sizes, with random weights and mild
running statistics. Differences are relative to the scale of the output; the limit is 1e-4.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the tables of all files named."""
    for name in sys.argv[1:] if argv is None else argv:
        path = Path(name)
        path.with_suffix(".md").write_text(table(json.loads(path.read_text("utf-8"))), "utf-8")
    return 0


def table(stored: Mapping[str, Any]) -> str:
    """The page of a stored sweep: how it ran, what came out, one line for each model."""
    rows = [Row.from_dict(row) for row in stored["rows"]]
    exports = {f"{row.suite}/{row.name}": row.exported for row in rows if row.exported is not None}
    fails = {name: one for name, one in exports.items() if not one.passes}
    passed = [one for one in exports.values() if one.passes]
    worst = max(
        (max(one.kept_difference or 0.0, one.folded_difference or 0.0) for one in passed),
        default=0.0,
    )
    lines = [
        _INTRODUCTION,
        *_conditions([*stored.get("earlier conditions", ()), stored["conditions"]]),
        f"{len(exports)} models: {len(passed)} exported in both forms, "
        f"{sum(one.num_kept for one in passed)} BatchNormalization nodes kept, "
        f"{sum(one.num_folded for one in passed)} of them folded, largest difference "
        f"{worst:.1e}. Why the others did not is below the table.",
        "",
        f"| {' | '.join(_TITLES)} |",
        "| --- |" + " ---: |" * (len(_TITLES) - 1),
        *(_line(name, one) for name, one in sorted(exports.items())),
    ]
    if fails:
        lines += ["", "## Without an export", ""]
        lines += [f"- {name}: {_reason(one)}" for name, one in sorted(fails.items())]
    return "\n".join(lines) + "\n"


def _conditions(all_of_them: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each distinct set of versions, with the commits that ran under it."""
    found: dict[str, list[str]] = {}
    for one in all_of_them:
        what = ("command", "commit", "date", "hardware")
        versions = ", ".join(
            f"{name} {value}" for name, value in one.items() if name not in what and value
        )
        text = f"`{one['command']}`, {one['hardware']}, {versions}"
        found.setdefault(text, []).append(f"{one['commit']} ({one['date']})")
    return [f"{text}, at {', '.join(dict.fromkeys(runs))}.\n" for text, runs in found.items()]


def _line(name: str, one: Exported) -> str:
    if not one.passes:
        return f"| {name} |" + " none |" + " |" * (len(_TITLES) - 2)
    numbers = (one.num_kept, one.num_folded, one.num_batch_stats)
    differences = (f"{one.kept_difference:.1e}", f"{one.folded_difference:.1e}")
    return f"| {name} | {' | '.join(map(str, (*numbers, *differences)))} |"


def _reason(one: Exported) -> str:
    if one.error:
        return one.error.removeprefix("ExportError: ")
    return f"compared on one batch size only, {one.batch_sizes}"


if __name__ == "__main__":
    sys.exit(main())
