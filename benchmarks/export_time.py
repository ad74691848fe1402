"""CPU time of ``export_onnx``, verification included, as a ratio to ``torch.onnx.export`` alone.

The variants alternate within one process, after one warm-up each, so that the ratios do not depend
on the state of the machine. One thread. Needs torchvision.
"""

import importlib.metadata
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measure import arguments, finish
from models import torchvision_model
from torch import nn

import bnrewrite

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "torchvision")
MODELS = ("resnet18", "mobilenet_v3_small", "densenet121")


def stock(model: nn.Module, x: torch.Tensor, path: Path) -> None:
    torch.onnx.export(
        model.eval(), (x,), path, dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False
    )


def kept(model: nn.Module, x: torch.Tensor, path: Path) -> None:
    bnrewrite.export_onnx(model, (x,), path, dynamic_shapes=[{0: "batch"}])


def folded(model: nn.Module, x: torch.Tensor, path: Path) -> None:
    bnrewrite.export_onnx(model, (x,), path, dynamic_shapes=[{0: "batch"}], fold=True)


VARIANTS: tuple[Callable[[nn.Module, torch.Tensor, Path], None], ...] = (stock, kept, folded)


def measure(name: str, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each variant, in the order of the runs."""
    torch.manual_seed(0)
    model = torchvision_model(name)
    converted = bnrewrite.convert(torchvision_model(name))
    x = torch.randn(2, 3, 224, 224)
    seconds: dict[str, list[float]] = {variant.__name__: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):
            for variant in VARIANTS:
                start = time.process_time()
                variant(model if variant is stock else converted, x, Path(folder) / "m.onnx")
                if repeat:
                    seconds[variant.__name__].append(time.process_time() - start)
    return seconds


def main() -> None:
    options = arguments(__doc__, rounds=5)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    print(f"CPU seconds, median [min-max] of {options.rounds}")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name in MODELS:
        seconds = measure(name, options.rounds)
        base = statistics.median(seconds["stock"])
        result[name] = {}
        for variant, times in seconds.items():
            middle = statistics.median(times)
            result[name][variant] = {"seconds": middle, "ratio": middle / base}
            print(
                f"{name:20} {variant:8} {middle:6.2f} [{min(times):.2f}-{max(times):.2f}]"
                f"   ratio {middle / base:.2f} (bar 1.5)",
                flush=True,
            )
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    finish(__file__, {"versions": versions, "models": result}, save=options.save)


if __name__ == "__main__":
    main()
