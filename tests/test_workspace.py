"""Which counters a launch gets, on a device that is only said to be a GPU."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from bnrewrite.kernels.triton import workspace as module


class _Cuda:
    """What the module asks torch.cuda; streams are numbers."""

    stream = 1
    is_capturing = False

    def __init__(self) -> None:
        self.waited = 0

    def current_stream(self, _: int) -> "_Cuda":
        return self

    def wait_event(self, _: object) -> None:
        self.waited += 1

    def raw_stream(self, _: int) -> int:
        return self.stream

    def is_current_stream_capturing(self) -> bool:
        return self.is_capturing


@pytest.fixture(name="cuda")
def _cuda() -> Iterator[_Cuda]:
    cuda = _Cuda()

    def allocate(reserve: module._Reserve) -> None:
        reserve._counters = torch.zeros(module._RESERVED, dtype=torch.int32)

    with (
        mock.patch.object(torch.cuda, "Event"),
        mock.patch.object(torch.cuda, "current_stream", cuda.current_stream),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(
            torch.cuda, "is_current_stream_capturing", cuda.is_current_stream_capturing
        ),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", cuda.raw_stream, create=True),
        mock.patch.object(module._Reserve, "_allocate", allocate),
        mock.patch.dict(module._RESERVES, clear=True),
    ):
        yield cuda


def _counters(num_blocks: int) -> torch.Tensor:
    counters = module._arrivals(0, num_blocks)
    assert counters is not None
    assert counters.numel() >= num_blocks
    return counters


def test_a_stream_keeps_its_own(cuda: _Cuda) -> None:
    first = _counters(3)
    assert _counters(2000).data_ptr() == first.data_ptr()
    cuda.stream = 3
    second = _counters(3)
    assert abs(second.data_ptr() - first.data_ptr()) >= first.numel() * first.element_size()
    cuda.stream = 1
    assert _counters(3).data_ptr() == first.data_ptr()
    # Each stream once, before it uses what another one has set to zero.
    assert cuda.waited == 2


def test_more_blocks_than_before_get_others(cuda: _Cuda) -> None:
    first = _counters(3)
    assert _counters(5000).data_ptr() != first.data_ptr()
    assert _counters(5000).data_ptr() == _counters(3).data_ptr()
    assert cuda.waited == 2


def test_no_two_launches_of_graphs_share(cuda: _Cuda) -> None:
    of_stream = _counters(8)
    cuda.is_capturing = True
    taken = [_counters(7) for _ in range(100)]
    for one in taken:
        one += 1
        assert one.data_ptr() % 16 == 0
    assert all(one.max() == 1 for one in taken)
    assert of_stream.max() == 0


def test_what_is_captured_first_has_nothing_to_take_from(cuda: _Cuda) -> None:
    cuda.is_capturing = True
    assert module._arrivals(0, 8) is None


def test_an_end_of_the_reserve(cuda: _Cuda) -> None:
    _counters(8)
    cuda.is_capturing = True
    while module._arrivals(0, 2048) is not None:
        pass
    cuda.is_capturing = False
    assert _counters(8).sum() == 0
    cuda.stream = 3
    assert module._arrivals(0, 8) is None


def test_memory_that_was_lacking_is_asked_for_again(cuda: _Cuda) -> None:
    """As those need who look for the largest batch that fits."""
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with (
        mock.patch.object(module._Reserve, "_allocate", side_effect=error),
        pytest.raises(torch.OutOfMemoryError),
    ):
        _counters(3)
    cuda.is_capturing = True
    assert module._arrivals(0, 3) is None
    cuda.is_capturing = False
    _counters(3)


def test_a_stream_of_each_thread_has_none(cuda: _Cuda) -> None:
    """Its number is the same in all threads."""
    cuda.stream = 2
    assert module._arrivals(0, 8) is None
    cuda.stream = 3
    _counters(8)


def test_counters_are_kept_once_the_stream_waits_for_their_zeros(cuda: _Cuda) -> None:
    with (
        mock.patch.object(cuda, "wait_event", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        _counters(3)
    _counters(3)
    assert cuda.waited == 1
