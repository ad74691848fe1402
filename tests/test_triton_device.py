"""Where GPUs use torch's kernels because Triton's cannot run, and what is said of it."""

import subprocess
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.driver import DriverConfig

from bnrewrite.kernels.triton import device

_NO_HEADERS = subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c", "-O3"])
_NO_COMPILER = RuntimeError("Failed to find C compiler.")


@pytest.fixture(name="gpu", autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the compute capability, and what happens when Triton looks for its driver."""

    def forget() -> None:
        device.runs_triton.cache_clear()
        device._failure.cache_clear()

    def pretend(capability: tuple[int, int], error: Exception | None = None) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        active = mock.PropertyMock(side_effect=error)
        monkeypatch.setattr(DriverConfig, "active", active)

    forget()
    yield pretend
    forget()


def test_a_gpu_runs_triton(gpu: Callable[..., None]) -> None:
    gpu((8, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device.runs_triton(0)
    assert device.whence(0) == "Triton kernels"


def test_an_old_gpu_runs_torchs_kernels(gpu: Callable[..., None]) -> None:
    gpu((7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not device.runs_triton(0)
    assert device.whence(0) == "ATen kernels: the compute capability is below 8.0"


def test_the_environment_disables_triton(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0))
    monkeypatch.setenv("BNREWRITE_KERNELS", "aten")
    assert not device.runs_triton(0)
    assert "BNREWRITE_KERNELS=aten" in device.whence(0)


@pytest.mark.parametrize(
    ("error", "said"),
    [(_NO_COMPILER, "Failed to find C compiler"), (_NO_HEADERS, "/usr/bin/gcc failed with exit")],
)
def test_an_image_without_a_compiler_warns_once(
    gpu: Callable[..., None], error: Exception, said: str
) -> None:
    gpu((9, 0), error)
    with pytest.warns(UserWarning, match="C compiler .* headers of Python") as caught:
        assert [device.runs_triton(0) for _ in range(2)] == [False, False]
    assert len(caught) == 1
    assert said in str(caught[0].message)
    assert device.whence(0).startswith("ATen kernels: Triton")
    assert said in device.whence(0)
