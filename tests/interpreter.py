"""Triton's kernels in tests: on a GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when Triton is imported, so it runs in a process of its own.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from tests import ranks as harness


class Interpreter:
    """Runs functions where Triton kernels run; what they raise is raised here."""

    def __init__(self) -> None:
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, whose tensors belong on :func:`device`."""
        if torch.cuda.is_available():
            return function(*args)
        if self._pool is None:
            with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
                context = multiprocessing.get_context("spawn")
                self._pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
                self._pool.submit(_prepare).result()
        return self._pool.submit(_run, function, args).result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _prepare() -> None:
    # Triton warns of its own future defaults when it is imported.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import triton.language  # noqa: F401


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    harness.fill_with_nan()
    with warnings.catch_warnings():
        # NumPy warns of NaN and infinity, which some cases are about.
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return function(*args)


def device() -> torch.device:
    """Where the tensors of a case belong."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def kernels_on_cpu_tensors() -> Iterator[None]:
    """Lets the dispatch of ``kernels.gpu`` take CPU tensors for tensors that Triton runs on."""
    from bnrewrite.kernels import gpu

    with mock.patch.object(gpu, "runs_triton", return_value=True):
        yield


def fixture() -> Iterator[Interpreter]:
    pytest.importorskip("triton")
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
