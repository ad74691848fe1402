"""``python -m bnrewrite demo``: its options, and what it does in what order."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

from bnrewrite.commandline import CommandError
from bnrewrite.demo.runs import BATCH_PER_RANK, MODES, Settings, equal_run, planned_runs

_MAX_RANKS = 64
_NEEDED = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "onnxruntime": "onnxruntime",
}


def _number(low: int, high: int, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not {what} from {low} to {high}")
        return value

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the demo."""
    defaults = Settings()
    parser.add_argument(
        "--world-size",
        type=_number(1, _MAX_RANKS, "a number of ranks"),
        default=defaults.world_size,
        metavar="N",
        help="number of ranks, each a process on this machine (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=_number(1, 1000, "a number of epochs"),
        default=defaults.epochs,
        metavar="N",
        help="passes over the training images (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_number(0, 2**31 - 1, "a seed"),
        default=defaults.seed,
        metavar="N",
        help="seed of weights, data split and data order (default: %(default)s)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=defaults.mode,
        help="mode of the converted runs. Each is compared with the plain torch run that it must "
        "equal: sync with one process on the global batch, local with plain DDP, frozen with one "
        "process whose BatchNorm is in evaluation mode (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        default="demo-out",
        metavar="DIR",
        help="folder for curves.png, results.json and digits.onnx (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo.

    Raises:
        CommandError: a package is missing, the folder cannot be written, or a rank failed.
    """
    started = time.perf_counter()
    _check_packages()
    folder = _writable_folder(args.out)
    settings = Settings(args.mode, args.world_size, args.epochs, args.seed)
    _run(settings, folder)
    print(f"\ndone in {time.perf_counter() - started:.0f} s")
    return 0


def _run(settings: Settings, folder: str) -> None:
    from bnrewrite.demo import text
    from bnrewrite.demo.data import load_digits
    from bnrewrite.demo.launcher import RankFailedError, launch
    from bnrewrite.demo.onnx_check import export_and_run
    from bnrewrite.demo.picture import draw
    from bnrewrite.demo.worker import compile_backend, make_run, uses_gpu

    torch.set_num_threads(1)
    device = torch.device("cuda" if uses_gpu(settings) else "cpu")
    print(_headline(settings, device), end="\n\n", flush=True)
    runs = planned_runs(settings)
    outcomes = {one.key: make_run(one, settings, device)[0] for one in runs if not one.distributed}
    try:
        found = launch(settings)
    except RankFailedError as failed:
        raise CommandError(str(failed), code=1) from failed
    outcomes.update(found["outcomes"])

    print(f"\n{text.table(runs, outcomes)}\n")
    print(text.comparisons(runs, outcomes, equal_run(settings.mode)))
    backend = compile_backend(device)
    if backend != "inductor":
        print(f"compiled with backend {backend}: this machine has no C++ compiler for Inductor")
    print(f"\n{found['report']}\n")

    _, test = load_digits(settings.seed)
    path = os.path.join(folder, "digits.onnx")
    check = export_and_run(outcomes["converted"].state, settings.mode, test, path)
    print(
        f"exported network in onnxruntime {check.runtime}, {check.num_images} test images in "
        f"float32:\n  largest difference {check.largest_difference:.1e} in logits up to "
        f"{check.largest_logit:.1f}, same digit for {check.num_same} of {check.num_images}\n"
    )
    picture = os.path.join(folder, "curves.png")
    draw(runs, outcomes, settings, picture)
    results = os.path.join(folder, "results.json")
    with open(results, "w", encoding="utf-8") as file:
        json.dump(text.summary(runs, outcomes), file)
    print(f"curves   {picture}\nnumbers  {results}\nmodel    {path}")


def _headline(settings: Settings, device: torch.device) -> str:
    ranks = "1 rank" if settings.world_size == 1 else f"{settings.world_size} ranks"
    images = "1 image" if BATCH_PER_RANK == 1 else f"{BATCH_PER_RANK} images"
    backend = "nccl" if device.type == "cuda" else "gloo"
    return (
        f"bnrewrite {settings.mode} on handwritten digits: {ranks} with {images} each per step,\n"
        f"{device.type}, {backend}, float64, seed {settings.seed}"
    )


def _check_packages() -> None:
    missing = [name for module, name in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise CommandError(
            f"the demo needs {', '.join(missing)}: pip install {' '.join(missing)}", code=1
        )


def _writable_folder(path: str) -> str:
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise CommandError(f"--out {path}: {error.strerror or error}") from error
    return path
