"""``python -m bnrewrite export MODULE:FACTORY OUT.onnx``: ``export_onnx`` on the command line."""

import argparse
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bnrewrite.errors import BnRewriteError
from bnrewrite.export.api import export_onnx

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``export``."""
    parser.add_argument(
        "model", metavar="MODULE:FACTORY", help="function or class that makes the model"
    )
    parser.add_argument("path", metavar="OUT.onnx", help="file to write")
    parser.add_argument(
        "--shape",
        action="append",
        required=True,
        metavar="N,C,H,W",
        help="shape of an example input, drawn from a normal distribution; once per input",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="dtype of the inputs")
    parser.add_argument(
        "--weights", metavar="FILE", help="state dict to load, as torch.save wrote it"
    )
    parser.add_argument(
        "--dynamic-batch", action="store_true", help="leave the first axis of every input free"
    )
    parser.add_argument(
        "--fold", action="store_true", help="fold BatchNorm into the layer before it"
    )
    parser.add_argument("--opset", type=int, default=None, help="version of the operators (18)")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare with the model in onnxruntime"
    )


def run(args: argparse.Namespace) -> int:
    """Exports and prints the report.

    Returns:
        The exit status: 0, or 1 after an error that is printed.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s ..."))
    log = logging.getLogger("bnrewrite.export")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        print(_export(args))
    except (BnRewriteError, TypeError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return 0


def _export(args: argparse.Namespace) -> object:
    model = _load(args.model)
    if args.weights:
        model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
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


def _load(text: str) -> nn.Module:
    """The model that ``MODULE:FACTORY`` makes.

    Raises:
        ValueError: there is no such module or factory, or it makes something else.
    """
    module_name, separator, path = text.partition(":")
    if not separator or not module_name or not path:
        raise ValueError(
            f"{text!r} is not of the form MODULE:FACTORY, e.g. torchvision.models:resnet50."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(module_name)
        for name in path.split("."):
            factory = getattr(factory, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{text!r} cannot be found: {error}.") from error
    made = _call(text, factory)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{text!r} gives {type(made).__name__}, not a torch.nn.Module.")
    return made


def _call(text: str, factory: Callable[..., Any] | nn.Module) -> Any:
    if isinstance(factory, nn.Module) or not callable(factory):
        return factory
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(
            f"{text!r} cannot be called without arguments: {error}. Name a function that can."
        ) from error
    except ValueError:
        pass
    return factory()


def _example(text: str, dtype: torch.dtype) -> torch.Tensor:
    try:
        shape = [int(size) for size in text.replace("x", ",").split(",")]
    except ValueError:
        raise ValueError(f"--shape {text!r} is not a list of sizes such as 1,3,224,224.") from None
    generator = torch.Generator().manual_seed(0)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)
