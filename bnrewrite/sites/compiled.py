"""Collectives of compiled graphs: what a rank says when one fails, and does while it waits.

A compiled graph waits in torch's C++, which knows neither sites nor other ranks. So the function
that a graph becomes is called by one of ours, which leaves the graph as it is: it has the ranks
agree first on what has changed without a compiler's knowledge, as by a load, it names the site in
the error, forward and backward, and a thread looks every second whether the rank waits for others
that have left the schedule.
"""

import functools
import linecache
import re
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from bnrewrite.agreement import join_open_round
from bnrewrite.errors import BnRewriteError
from bnrewrite.groups import NO_GROUP, find_group, name_in
from bnrewrite.guards import graph_in_the_making, runs_in_python
from bnrewrite.naming import sites_of
from bnrewrite.ops.library import argument
from bnrewrite.watch import peer_error

_ROUND_OPS = ("batch_norm", "batch_norm_act", "start_batch_norm", "shuffle_batch_norm")
"""Ops that make one collective forward each, and one backward if an input needs a gradient."""

_SUSPICIOUS_S = 4.0
"""How long the rank waits in one collective before the thread looks what the others are doing."""


class _Round(NamedTuple):
    group: str
    sites: str


def guard_graph(schedule: Any) -> None:
    """Sees to the graph that Dynamo is tracing; a member calls it that is part of the graph.

    Args:
        schedule: of the member.
    """
    output = graph_in_the_making()
    compile_graph: Any = getattr(output, "compiler_fn", None)
    if compile_graph is None or torch.compiler.is_exporting():
        return
    if hasattr(compile_graph, _GUARDED):
        getattr(compile_graph, _GUARDED).add(schedule)
        return
    schedules = weakref.WeakSet((schedule,))

    @functools.wraps(compile_graph)
    def compile_and_guard(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        function = compile_graph(graph, inputs)
        rounds = list(_rounds(graph, inputs))
        return _guarded(function, rounds, schedules) if rounds else function

    setattr(compile_and_guard, _GUARDED, schedules)
    output.compiler_fn = compile_and_guard


_GUARDED = "_bnrewrite_guarded"


def _rounds(graph: fx.GraphModule, inputs: Sequence[Any]) -> Iterator[_Round]:
    """The collectives of a training forward in order, with the sites that share each."""
    known = dict(zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=False))
    for node in graph.graph.nodes:
        target: Any = node.target
        if getattr(target, "namespace", "") != "bnrewrite" or target._opname not in _ROUND_OPS:
            continue
        groups = argument(node, "group")
        groups = [groups] if isinstance(groups, str) else groups
        group = next((name for name in groups if name != NO_GROUP), None)
        if group is not None:
            tensors = (known.get(one) for one in node.all_input_nodes)
            yield _Round(name_in(group), sites_of(tuple(tensors)))


def _guarded(
    function: Callable[..., Any], rounds: list[_Round], schedules: Iterable[Any]
) -> Callable[..., Any]:
    """``function`` after what ranks agree on, with errors that name the round.

    So does the backward of its results.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        # All ranks in the same order.
        for schedule in sorted(schedules, key=_number):
            schedule.before_run(args)
        results = _run(function, args, rounds)
        _guard_backward(results, rounds[::-1])
        return results

    return run


def _number(schedule: Any) -> int:
    return int(schedule.key)


def _guard_backward(results: Any, rounds: list[_Round]) -> None:
    """Replaces the backward of the autograd function of this one graph, once."""
    for result in tree_leaves(results):
        node = result.grad_fn if isinstance(result, Tensor) else None
        cls: Any = getattr(type(node), "_forward_cls", None)
        if cls is None or cls.__name__ != "CompiledFunction":
            continue
        if _GUARDED not in vars(cls):
            cls.backward = staticmethod(functools.partial(_backward, cls.backward, rounds))
            setattr(cls, _GUARDED, True)
        return


@runs_in_python
def _backward(function: Callable[..., Any], rounds: list[_Round], *args: Any) -> Any:
    return _run(function, args, rounds)


def _run(function: Callable[..., Any], args: Any, rounds: list[_Round]) -> Any:
    started = time.monotonic()
    _watcher.enter(sorted({one.group for one in rounds}))
    try:
        return function(*args)
    except RuntimeError as error:
        place = _failed_collective(error)
        if place is None:
            raise
        found = _watcher.found
        if found is not None:
            raise found from error
        waited_s = time.monotonic() - started
        raise _named(place, rounds, waited_s, error) from error
    finally:
        _watcher.leave()


def _named(
    frame: types.FrameType, rounds: list[_Round], waited_s: float, error: RuntimeError
) -> BnRewriteError:
    """The error with the sites of the collective of generated code that ``frame`` waits for."""
    index, num = _number_of_wait(frame)
    if index is not None and num == len(rounds):
        sites = rounds[index].sites
    else:
        names = (name for one in rounds for name in one.sites.split(", "))
        sites = f"one of {', '.join(dict.fromkeys(names))}"
    group = find_group(rounds[0].group)
    return peer_error("collective in compiled code", group, (), waited_s, error, sites=sites)


_LAUNCH = re.compile(
    r"(?:(\w+) = )?torch\.ops\._c10d_functional\.(?!wait_tensor)\w+\.default\((\w+)"
)
_WAIT = re.compile(r"torch\.ops\._c10d_functional\.wait_tensor\.default\((\w+)")


def _number_of_wait(frame: types.FrameType) -> tuple[int | None, int]:
    """Which collective of the generated code is waited for, and how many it launches."""
    lines = linecache.getlines(frame.f_code.co_filename, frame.f_globals)
    launches = [
        (number, found.group(1) or found.group(2))
        for number, line in enumerate(lines, 1)
        if (found := _LAUNCH.search(line))
    ]
    line = frame.f_lineno
    wait = _WAIT.search(lines[line - 1]) if 0 < line <= len(lines) else None
    indices = [
        index
        for index, (number, name) in enumerate(launches)
        if wait is not None and name == wait.group(1) and number < line
    ]
    return (indices[-1] if indices else None), len(launches)


_CALL = torch._ops.OpOverload.__call__.__code__


def _is_collective(frame: types.FrameType) -> bool:
    if frame.f_code is not _CALL:
        return False
    return frame.f_locals["self"].namespace == "_c10d_functional"


def _failed_collective(error: BaseException) -> Any:
    """The frame of generated code whose collective raised ``error``, or None."""
    before, traceback = None, error.__traceback__
    while traceback is not None:
        if _is_collective(traceback.tb_frame):
            return before
        before, traceback = traceback.tb_frame, traceback.tb_next
    return None


class _Watcher:
    """A thread that looks, while compiled code runs, whether it waits for ranks that have left."""

    def __init__(self) -> None:
        self.found: BnRewriteError | None = None
        self._running: tuple[int, list[str]] | None = None
        self._thread: threading.Thread | None = None

    def enter(self, groups: list[str]) -> None:
        """Compiled code of this thread starts, with collectives over ``groups``."""
        self.found = None
        self._running = threading.get_ident(), groups
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._watch, name="bnrewrite", daemon=True)
            self._thread.start()

    def leave(self) -> None:
        """The compiled code has come to its end."""
        self._running = None

    def _watch(self) -> None:
        seen, since = None, time.monotonic()
        while True:
            time.sleep(1.0)
            running = self._running
            wait = None if running is None else _wait_of(running[0])
            if wait != seen or wait is None:
                seen, since = wait, time.monotonic()
            elif running is not None and time.monotonic() - since > _SUSPICIOUS_S:
                try:
                    for group in running[1]:
                        join_open_round(group, may_take_over=False)
                except BnRewriteError as error:
                    # The wait ends when a rank that has left closes its connections.
                    self.found, self._running = error, None


def _wait_of(thread: int) -> tuple[int, int] | None:
    """Something that tells the wait of ``thread`` in a collective from others, if it waits."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not _is_collective(frame):
        if "torch" not in frame.f_code.co_filename:
            return None
        frame = frame.f_back
    return None if frame is None or frame.f_back is None else (id(frame), frame.f_back.f_lineno)


_watcher = _Watcher()
