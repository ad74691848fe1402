"""``python -m bnrewrite export MODULE:FACTORY OUT.onnx``: ``export_onnx`` on the command line."""

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bnrewrite.commandline import MODEL_HELP, CommandError, load_model
from bnrewrite.errors import BnRewriteError, ExportError
from bnrewrite.export.api import export_onnx
from bnrewrite.export.arguments import check_opset
from bnrewrite.export.paths import check_path

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``export``."""
    parser.add_argument("model", metavar="MODULE:FACTORY", help=MODEL_HELP)
    parser.add_argument("path", metavar="OUT.onnx", help="file to write")
    parser.add_argument(
        "--shape",
        action="append",
        required=True,
        metavar="N,C,H,W",
        help="shape of an example input, drawn from a normal distribution (integers: zeros); "
        "repeat for each input",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="dtype of the inputs and, if floating-point, of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="state dict to load, written by torch.save"
    )
    parser.add_argument(
        "--dynamic-batch", action="store_true", help="make the first axis of every input dynamic"
    )
    parser.add_argument(
        "--fold", action="store_true", help="fold BatchNorm into the layer before it"
    )
    parser.add_argument("--opset", type=int, default=None, help="operator version (default: 18)")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare onnxruntime with the model"
    )


def run(args: argparse.Namespace) -> int:
    """Exports and prints the report.

    Returns:
        The exit status, 0.

    Raises:
        CommandError: an argument is wrong, or a file cannot be read or written.
        ExportError: the model cannot be exported.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s ..."))
    log = logging.getLogger("bnrewrite.export")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with _ended_like_an_interrupt(signal.SIGTERM):
            print(_export(args))
    except BnRewriteError:
        raise
    except (TypeError, ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    except ImportError as error:
        if isinstance(error.__cause__, (KeyboardInterrupt, SystemExit)):
            # Compiled modules turn an interrupt of their import into this.
            raise error.__cause__ from None
        raise CommandError(str(error), code=1) from error
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return 0


@contextlib.contextmanager
def _ended_like_an_interrupt(number: signal.Signals) -> Iterator[None]:
    """Lets a signal that would end the process at once clean up first.

    Half of a large model would stay on the disk otherwise.
    """

    def end(*_: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        # Only there can handlers be set.
        yield
        return
    before = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)


def _export(args: argparse.Namespace) -> object:
    try:
        check_opset(args.opset)
        check_path(args.path)
    except ExportError as error:
        # What the command line says wrong, before a model is made that may take long.
        raise CommandError(str(error)) from error
    model = load_model(args.model)
    if args.weights:
        _load_weights(model, args.weights)
    dtype = _DTYPES[args.dtype]
    if dtype.is_floating_point:
        model.to(dtype)
    examples = tuple(_example(text, dtype) for text in args.shape)
    return export_onnx(
        model,
        examples,
        args.path,
        dynamic_shapes=[{0: "batch"}] * len(examples) if args.dynamic_batch else None,
        opset_version=args.opset,
        fold=args.fold,
        verify=not args.no_verify,
    )


def _load_weights(model: nn.Module, file: str) -> None:
    try:
        with open(file, "rb") as opened:
            state = torch.load(opened, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CommandError(f"--weights {file}: {error.strerror}") from error
    except Exception as error:
        # Whatever a file of another kind makes the unpickler do.
        raise CommandError(
            f"--weights {file} is not a file that torch.load(weights_only=True) can read. "
            "Write it with torch.save(model.state_dict(), ...)"
        ) from error
    if not isinstance(state, Mapping):
        raise CommandError(
            f"--weights {file} does not hold a state dict, but {type(state).__name__}"
        )
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise CommandError(
            f"--weights {file} holds no tensors, but {', '.join(map(str, state))}. Save the state "
            "dict in it to a separate file"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reasons = [" ".join(line.split()) for line in str(error).splitlines()]
        raise CommandError(f"--weights {file}: {' '.join(reasons)}") from error


def _example(text: str, dtype: torch.dtype) -> Tensor:
    try:
        shape = [int(size) for size in text.replace("x", ",").split(",")]
    except ValueError:
        raise ValueError(f"--shape {text!r} is not a list of sizes such as 1,3,224,224.") from None
    if min(shape) < 1:
        raise ValueError(f"--shape {text!r} has a size below 1, so the example would be empty.")
    generator = torch.Generator().manual_seed(0)
    try:
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        return torch.randn(shape, generator=generator).to(dtype)
    except (RuntimeError, TypeError, OverflowError):
        raise ValueError(f"--shape {text!r} does not fit into memory.") from None
