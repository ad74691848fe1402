"""Settings and fixtures that all tests share."""

import signal
from collections.abc import Iterator

import pytest
import torch

from tests import ranks as harness

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has them ignore interrupts, and what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """One thread, a fixed seed, NaN in uninitialized memory, and no state of a compiler left."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    harness.fill_with_nan()
    yield
    assert torch.is_grad_enabled()
    assert not torch.distributed.is_initialized(), "the test left a process group behind"


@pytest.fixture(scope="session")
def ranks() -> Iterator[harness.RankPool]:
    """Processes that form worlds of 2, 3 and 4 ranks."""
    pool = harness.RankPool()
    yield pool
    pool.close()
