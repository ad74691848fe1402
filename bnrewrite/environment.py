"""``python -m bnrewrite env``: versions, devices and a self-check, for bug reports."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bnrewrite.convert import convert
from bnrewrite.kernels.native import load
from bnrewrite.kernels.triton import device as gpu
from bnrewrite.report import report
from bnrewrite.torch_versions import NEWEST, OLDEST, is_tested

_PACKAGES = ("bnrewrite", "torch", "triton", "onnx", "onnxscript", "onnxruntime", "torchvision")
_BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the self-check: a difference and how large it may be."""

    name: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the difference is of rounding size."""
        return self.difference <= self.allowed


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; "not installed" where one is missing."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _remark(name: str) -> str:
    """What is to be said of the version of a package, if anything."""
    if name != "torch" or is_tested():
        return ""
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return f"  not tested (tested: {oldest} to {newest})"


def devices() -> list[str]:
    """The CPU and the GPUs, with what decides about speed."""
    found = [f"cpu, {torch.get_num_threads()} threads, {load.whence()}"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                f"cuda:{index}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"compute capability {properties.major}.{properties.minor}, {gpu.whence(index)}"
            )
    return found


def backends() -> list[str]:
    """Process-group backends that this build of torch has."""
    if not dist.is_available():
        return []
    return [name for name in _BACKENDS if dist.is_backend_available(name)]


def self_check() -> list[Check]:
    """A converted layer against ``F.batch_norm``, on each kind of device; a layer in a graph."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    checks = [check for kind in kinds for check in _check_device(torch.device(kind))]
    return [*checks, _check_capture()]


def _check_capture() -> Check:
    """Whether ``torch.fx`` of this version can be made to record: what it left is the difference.

    Layers outside graphs compute the same, so that nothing else would show it.
    """
    model = convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    left = [site for site in report(model).sites if site.owner is None]
    return Check("sites outside graphs", len(left), 0)


def _check_device(device: torch.device) -> list[Check]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 7, generator=generator, dtype=torch.float64).to(device)
    grad = torch.randn(4, 3, 5, 7, generator=generator, dtype=torch.float64).to(device)
    layer = nn.BatchNorm2d(3).to(device, torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    mean, var = torch.zeros_like(layer.weight), torch.ones_like(layer.weight)

    def plain(value: Tensor) -> Tensor:
        return F.batch_norm(value, mean, var, layer.weight, layer.bias, True, 0.1, 1e-5)

    expected, expected_grad = _forward_backward(plain, x, grad)
    converted = convert(layer)
    y, dx = _forward_backward(converted, x, grad)
    pairs = {
        "output": (y, expected),
        "input gradient": (dx, expected_grad),
        "running_mean": (layer.running_mean, mean),
        "running_var": (layer.running_var, var),
    }
    # Values of order one, each a sum of 140: a hundred roundings are a generous bound.
    allowed = 100 * torch.finfo(torch.float64).eps
    return [
        Check(f"{device.type} {name}", (one - two).abs().max().item(), allowed)
        for name, (one, two) in pairs.items()
        if isinstance(one, Tensor)
    ]


def _forward_backward(
    function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    (dx,) = torch.autograd.grad(y, leaf, grad)
    return y.detach(), dx


def describe(checks: list[Check]) -> str:
    """The text of ``python -m bnrewrite env``."""
    lines = [f"{name:14}{version}{_remark(name)}" for name, version in versions().items()]
    lines += [f"{'device':14}{device}" for device in devices()]
    lines.append(f"{'backends':14}{', '.join(backends()) or 'none'}")
    lines.append("self-check: a converted BatchNorm2d against F.batch_norm, float64")
    for check in checks:
        verdict = "ok" if check.passed else f"FAILED, at most {check.allowed:.1e} is allowed"
        lines.append(f"  {check.name:24}{check.difference:8.1e}  {verdict}")
    return "\n".join(lines)


def to_dict(checks: list[Check]) -> dict[str, Any]:
    """The same as plain values, ready for ``json.dumps``."""
    return {
        "versions": versions(),
        "devices": devices(),
        "backends": backends(),
        "self_check": [dataclasses.asdict(check) | {"passed": check.passed} for check in checks],
    }
