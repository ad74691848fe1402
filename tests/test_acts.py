"""What a forward does besides computing happens at each call, and never while it is traced."""

import builtins
import concurrent.futures
import functools
import gc
import importlib
import io
import operator
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from os import write
from pathlib import Path
from sys import version_info
from typing import Any, NamedTuple
from warnings import warn

import pytest
import torch
from torch import Tensor, nn, set_num_threads

import bnrewrite
from bnrewrite.capture.owner import is_owner

X = torch.linspace(-1, 3, 4 * 3 * 5 * 5).view(4, 3, 5, 5).sin()
QUEUE: queue.Queue[int] = queue.Queue()
SIMPLE: queue.SimpleQueue[int] = queue.SimpleQueue()
SEMAPHORE = threading.Semaphore(100)
LOCK = threading.Lock()
TEMPORARY = tempfile.TemporaryDirectory()
FOLDER = Path(TEMPORARY.name)
POOL = concurrent.futures.ThreadPoolExecutor(1)
DIGITS = re.compile("[0-9]")
FIRST = operator.itemgetter(0)
STARTED = threading.Semaphore(0)


class Pair(NamedTuple):
    """Its fields are read by code in C."""

    first: int
    second: int


class Net(nn.Module):
    """Does something, and normalizes."""

    def __init__(self, act: Callable[["Net"], Any]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.act = functools.partial(act)
        self.tell = warnings.warn
        self.stop = threading.Event()
        self.count = 0
        self.loud = False

    def forward(self, x: Tensor) -> Tensor:
        self.act(self)
        return self.bn(self.conv(x)).relu()


def _raise_count(net: Net) -> None:
    object.__setattr__(net, "count", net.count + 1)


def _count_in_child(net: Any) -> None:
    object.__setattr__(net.bn, "count", getattr(net.bn, "count", 0) + 1)


def _locked(_: Net) -> None:
    with LOCK:
        pass


def _no_gradient(net: Net) -> None:
    net.conv.weight.grad = None


def _detected(_: Net) -> None:
    with torch.autograd.set_detect_anomaly(False):
        pass


def _benchmark(_: Net) -> None:
    torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark


def _variable(_: Net) -> None:
    os.environ["BNREWRITE_ACTS"] = os.environ.get("BNREWRITE_ACTS", "") + "a"


def _file(_: Net) -> None:
    (FOLDER / "text").write_text("a")


def _number_of(kind: str) -> int:
    return len(list(FOLDER.glob(kind)))


ACTS: dict[str, tuple[Callable[[Net], Any], str]] = {
    "a warning": (lambda net: warnings.warn("small", stacklevel=2), "warns"),
    "a warning by name": (lambda net: warn("small", stacklevel=2), "warns"),
    "a warning by another name": (lambda net: net.tell("small"), "by another name"),
    "a queue": (lambda net: QUEUE.put(1), "that other threads may wait for"),
    "a simple queue": (lambda net: SIMPLE.put(1), "reads a SimpleQueue"),
    "a semaphore": (lambda net: SEMAPHORE.acquire(), "that other threads may wait for"),
    "an event": (lambda net: net.stop.set(), "that other threads may wait for"),
    "a lock": (_locked, "reads a lock"),
    "a thread": (lambda net: threading.Thread(target=STARTED.release).start(), "thread"),
    "a pool": (lambda net: POOL.submit(STARTED.release), "reads a ThreadPoolExecutor"),
    "a process": (lambda net: subprocess.run(["true"]), "starts a process"),
    "a socket": (lambda net: socket.socket().close(), "opens a socket"),
    "a path": (_file, "opens a file"),
    "open": (lambda net: open(FOLDER / "text", "w").close(), "opens a file"),
    "a folder": (lambda net: os.makedirs(FOLDER / "folder", exist_ok=True), "calls os.mkdir()"),
    "a temporary file": (lambda net: os.close(tempfile.mkstemp(dir=FOLDER)[0]), "calls os.open()"),
    "a descriptor": (lambda net: os.write(1, b""), "calls os.write()"),
    "a descriptor by name": (lambda net: write(1, b""), "calls os.write()"),
    "stdout": (lambda net: sys.stdout.write(""), "reads"),
    "torch.save": (lambda net: torch.save({}, FOLDER / "state"), "saves a file"),
    "the environment": (_variable, "calls os.putenv()"),
    "threads of torch": (lambda net: torch.set_num_threads(torch.get_num_threads()), "a setting"),
    "threads by name": (lambda net: set_num_threads(torch.get_num_threads()), "a setting"),
    "deterministic": (lambda net: torch.use_deterministic_algorithms(False), "a setting"),
    "a flag of a backend": (_benchmark, "a setting"),
    "anomalies": (_detected, "a setting"),
    "a count": (_raise_count, "while bypassing the module"),
    "a count in a child": (_count_in_child, "while bypassing the module"),
    "an attribute less": (
        lambda net: net.count and object.__delattr__(net, "loud"),
        "while bypassing the module",
    ),
    "a gradient": (_no_gradient, "sets 'grad' on a computed value"),
    "garbage": (lambda net: gc.collect(), "runs the garbage collector"),
}


def _state(net: Any) -> list[Any]:
    return [
        QUEUE.qsize(), SIMPLE.qsize(), SEMAPHORE._value, os.environ.get("BNREWRITE_ACTS"),  # pyright: ignore
        _number_of("*"), net.count, getattr(net.bn, "count", 0), net.stop.is_set(), STARTED._value,  # pyright: ignore
        "loud" in net.__dict__, net.conv.weight.grad is None,
    ]  # fmt: skip


@pytest.mark.parametrize("what", ACTS)
def test_what_a_forward_does_happens_at_its_calls_only(what: str) -> None:
    act, reason = ACTS[what]
    # torch.use_deterministic_algorithms(False) is an act, and the tests have set another value.
    warns, fills = what.startswith("a warning"), torch.are_deterministic_algorithms_enabled()
    net = Net(act)
    net.count = int(what == "an attribute less")
    net.conv.weight.grad = torch.zeros(4, 3, 1, 1)
    before = _state(net)
    bnrewrite.convert(net)
    assert _state(net) == before
    assert torch.are_deterministic_algorithms_enabled() == fills
    (skip,) = bnrewrite.report(net).skipped
    assert reason in skip.reason
    assert __file__ in skip.reason or "bypassing" in skip.reason
    assert not is_owner(net)
    if what in ("deterministic", "an attribute less"):
        return
    for _ in range(2):
        if warns:
            with pytest.warns(UserWarning, match="small"):
                net(X)
        else:
            net(X)
    if what in ("a queue", "a simple queue", "a semaphore", "the environment", "a count"):
        assert _state(net) != before
    if what in ("a thread", "a pool"):  # Neither goes on into the next test.
        assert all(STARTED.acquire(timeout=60) for _ in range(2))
        assert _state(net) == before


def _imports(_: Net) -> None:
    importlib.import_module("colorsys")
    import this_is_imported  # pyright: ignore  # noqa: F401


def _acts_if_loud(net: Net) -> None:
    if net.loud:
        warn("loud", stacklevel=2)
        warnings.warn("loud", stacklevel=2)
        write(1, b"")
        os.remove(FOLDER / "text")
        open("/nowhere")  # noqa: SIM115
        threading.Thread(target=print).start()


@pytest.mark.parametrize(
    "act",
    [
        _acts_if_loud,
        lambda net: DIGITS.match("1"),
        lambda net: FIRST((1, 2)),
        lambda net: FOLDER.name,
        lambda net: net.stop.is_set(),
        lambda net: Pair(1, 2).first + version_info.major,
        _imports,
    ],
    ids=["no act now", "a pattern", "an item", "a name of a path", "a flag", "tuples", "an import"],
)
def test_what_does_nothing_is_captured(
    act: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An import reads files, and so may what is imported.
    (tmp_path / "this_is_imported.py").write_text("TEXT = open(__file__).read()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "this_is_imported", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        net = bnrewrite.convert(Net(act))
        gc.collect()
    assert is_owner(net), bnrewrite.report(net).skipped


def test_functions_that_act_are_given_back() -> None:
    names = ((builtins, "open"), (io, "open"), (os, "mkdir"), (warnings, "warn"), (gc, "collect"))
    before = [getattr(home, name) for home, name in names]
    torch_before = dict(vars(torch._C))
    bnrewrite.convert(Net(_acts_if_loud))
    bnrewrite.convert(Net(ACTS["a warning by name"][0]))
    assert all(getattr(home, name) is one for (home, name), one in zip(names, before, strict=True))
    assert warn is warnings.warn
    assert write is os.write
    assert vars(torch._C) == torch_before


def test_another_thread_acts_while_a_model_is_converted() -> None:
    """A warning of another thread is about the line that it would be about, too."""
    lines: set[str] = set()
    ends = threading.Event()

    def go_on() -> None:
        while not ends.is_set():
            QUEUE.put(1)
            QUEUE.get()
            warnings.warn("from a thread", stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=go_on)
        thread.start()
        nets = [bnrewrite.convert(Net(lambda net: None)) for _ in range(5)]
        ends.set()
        thread.join()
        lines = {one.filename for one in caught}
    assert all(map(is_owner, nets))
    assert lines == {__file__}
