"""``python -m tests.zoo.compare``: numbers of the zoo, model by model, with an account of them."""

import argparse
import fnmatch
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.ranks import RankPool
from tests.zoo.__main__ import compact, conditions
from tests.zoo.numbers import (
    COMPARED,
    DOMAINS,
    FAMILIES,
    Numbers,
    compare,
    compare_on_two_ranks,
)
from tests.zoo.spec import MissingPackage, num_batch_norms
from tests.zoo.suites import specs_of

_PASSES = "passes"


def main(argv: list[str] | None = None) -> int:
    """Compares models that the file has no result of yet; 0 if none of all differs."""
    options = _options(argv)
    torch.set_num_threads(1)
    models = [one for one in (*COMPARED, *FAMILIES, *DOMAINS) if _is_wanted(one, options)]
    rows: dict[str, dict[str, Any]] = {}
    if options.json is not None and options.json.exists():
        rows = {row["model"]: row for row in json.loads(options.json.read_text())["rows"]}
    key = "two ranks" if options.ranks else "one rank"
    words = sys.argv[1:] if argv is None else argv
    circumstances = conditions(" ".join(["python -m tests.zoo.compare", *words]))
    pool = RankPool() if options.ranks else None
    for model in models:
        row = rows.setdefault(str(model), {"model": str(model), "size": model.size})
        if row.get(key, {}).get("result") == _PASSES:
            continue
        row[key] = found = _compare(model, pool, options.seconds)
        found["commit"] = circumstances["commit"]
        print(f"{model!s:50} {key:10} {found['cpu_s']:>7} s  {found['result']}", flush=True)
        if options.json is not None:
            result = {"conditions": circumstances, "rows": list(rows.values())}
            options.json.write_text(compact(result), "utf-8")
    if pool is not None:
        pool.close()
    done = [row[key]["result"] for row in rows.values() if key in row]
    print(f"{len(done)} models on {key}, {done.count(_PASSES)} pass")
    return 0 if done and set(done) == {_PASSES} else 1


def _is_wanted(model: Numbers, options: argparse.Namespace) -> bool:
    """Whether a model is asked for, installed and, on two ranks, one whose batch can be split."""
    if not fnmatch.fnmatch(str(model), options.name) or (options.ranks and not model.splits):
        return False
    try:
        specs_of(model.suite)
    except MissingPackage as error:
        print(f"{model} is left out: {error}", file=sys.stderr)
        return False
    return True


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo.compare",
        description="Trains models of the zoo for three steps and evaluates them, in float64, "
        "beside the unconverted model: outputs, gradients and buffers must be equal.",
    )
    parser.add_argument(
        "--name", default="*", help="pattern of names with the suite, timm-dla34, default all"
    )
    parser.add_argument(
        "--ranks",
        action="store_true",
        help="one step on two ranks, with one image and three, against one process with all four",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="give a model up after this time"
    )
    return parser.parse_args(argv)


def _compare(model: Numbers, pool: RankPool | None, seconds: float) -> dict[str, Any]:
    """Compares in a process of its own, which may be stopped."""
    # What a library needs is imported once, before the processes are forked.
    specs_of(model.suite)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    start = time.monotonic()
    if pool is not None:
        result = _outcome(model, pool)
        return {"result": result, "cpu_s": round(time.monotonic() - start, 1)}
    process = context.Process(target=lambda: theirs.send(_measured(model)), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            return ours.recv()
    except EOFError:
        return {"result": "the process died", "cpu_s": 0.0}
    finally:
        process.kill()
        process.join()
    return {"result": f"not done after {seconds:.0f} s", "cpu_s": seconds}


def _measured(model: Numbers) -> dict[str, Any]:
    start = time.process_time()
    result = _outcome(model, None)
    cpu_s = round(time.process_time() - start, 1)
    return {"result": result, "cpu_s": cpu_s, "layers": num_batch_norms(model.make())}


def _outcome(model: Numbers, pool: RankPool | None) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if pool is None:
                compare(model)
            else:
                compare_on_two_ranks(model, pool, rtol=1e-7)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {(str(error) or 'no message').strip().splitlines()[-1]}"
    return _PASSES


if __name__ == "__main__":
    sys.exit(main())
