"""Collectives of compiled graphs: what a rank says when one fails, and does while it waits.

A compiled graph waits in torch's C++, which knows neither sites nor other ranks. So the function
that a graph becomes is called by one of ours, which leaves the graph as it is: it has the ranks
agree first, as a member does that is not compiled, it names the site in the error, forward and
backward, and a thread looks every second whether the rank waits for others that have left the
schedule.
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
from bnrewrite.guards import graph_in_the_making
from bnrewrite.naming import holders_of, places_of_sites, sites_of
from bnrewrite.ops.library import argument
from bnrewrite.watch import peer_error

_ROUND_OPS = ("batch_norm", "batch_norm_act", "start_batch_norm", "shuffle_batch_norm")
"""Ops that make one collective forward each, and one backward if an input needs a gradient."""

_SUSPICIOUS_S = 4.0
"""How long the rank waits in one collective before the thread looks what the others are doing."""


def guard_graph(schedules_of: Callable[[list[Any]], Iterable[Any]]) -> None:
    """Sees to the graph that Dynamo is tracing; a member calls it that is part of the graph.

    Args:
        schedules_of: the schedules of sites.
    """
    output = graph_in_the_making()
    compile_graph: Any = getattr(output, "compiler_fn", None)
    if compile_graph is None or hasattr(compile_graph, _GUARDED) or torch.compiler.is_exporting():
        return

    @functools.wraps(compile_graph)
    def compile_and_guard(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return _guarded(compile_graph(graph, inputs), _Graph(graph, inputs, schedules_of))

    setattr(compile_and_guard, _GUARDED, True)
    output.compiler_fn = compile_and_guard


_GUARDED = "_bnrewrite_guarded"


class _Round(NamedTuple):
    """One collective of a graph.

    Attributes:
        group: name of its process group.
        places: which inputs of the graph are read where it starts.
    """

    group: str
    places: list[int]


class _Given(NamedTuple):
    """What a graph was given: tensors of sites, and the modules of these."""

    tensors: list[weakref.ref[Tensor]]
    sites: list[weakref.ref[Any]]


_MOST_GIVEN = 16
"""Models, or blocks of them, that run the same graph by turns."""


class _Graph:
    """A compiled graph, and the sites whose tensors it was last given.

    Copies of a model run the same graph, and so do blocks of one structure.

    Args:
        graph: as Dynamo traced it.
        inputs: for which it did.
        schedules_of: the schedules of sites.

    Attributes:
        rounds: its collectives in order.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: Sequence[Any],
        schedules_of: Callable[[list[Any]], Iterable[Any]],
    ) -> None:
        self.rounds = list(_rounds(graph))
        self._schedules_of = schedules_of
        self._places = places_of_sites(inputs)
        # If modules are compared by identity, their tensors are part of the graph.
        self._constants = (*graph.parameters(), *graph.buffers())
        self._given: dict[int, _Given] = {}
        self._latest = _Given([], [])

    def before_run(self, args: Sequence[Any]) -> None:
        """Has the ranks agree if anything changed since they did.

        Raises:
            ScheduleError: the ranks differ.
            PeerError: a rank did not answer.
        """
        self._latest = self._look_up([args[at] for at in self._places])
        sites = [site for ref in self._latest.sites if (site := ref()) is not None]
        for schedule in self._schedules_of(sites):
            schedule.before_run(args)

    def sites_at(self, index: int) -> str:
        """Names of the sites whose collective is the one with this number."""
        places = set(self.rounds[index].places)
        tensors = zip(self._places, self._latest.tensors, strict=True)
        return sites_of(ref() for at, ref in tensors if at in places)

    def _look_up(self, tensors: list[Tensor]) -> _Given:
        key = id(tensors[0]) if tensors else 0
        given = self._given.get(key)
        if given is None or any(
            ref() is not one for ref, one in zip(given.tensors, tensors, strict=True)
        ):
            if len(self._given) >= _MOST_GIVEN:
                self._given.clear()
            sites = holders_of((*tensors, *self._constants))
            given = _Given([*map(weakref.ref, tensors)], [*map(weakref.ref, sites)])
            self._given[key] = given
        return given


def _rounds(graph: fx.GraphModule) -> Iterator[_Round]:
    """The collectives of a training forward in order."""
    place_of = {node: at for at, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    for node in graph.graph.nodes:
        target: Any = node.target
        if getattr(target, "namespace", "") != "bnrewrite" or target._opname not in _ROUND_OPS:
            continue
        groups = argument(node, "group")
        groups = [groups] if isinstance(groups, str) else groups
        group = next((name for name in groups if name != NO_GROUP), None)
        if group is not None:
            places = [place_of[one] for one in node.all_input_nodes if one in place_of]
            yield _Round(name_in(group), places)


def _guarded(function: Callable[..., Any], graph: _Graph) -> Callable[..., Any]:
    """``function`` after what ranks agree on, with errors that name the round.

    So does the backward of its results.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        graph.before_run(args)
        if not graph.rounds:
            return function(*args)
        results = _run(function, args, graph)
        _guard_backward(results, graph)
        return results

    return run


def _guard_backward(results: Any, graph: _Graph) -> None:
    """Replaces the backward of the autograd function of this one graph, once."""
    for result in tree_leaves(results):
        node = result.grad_fn if isinstance(result, Tensor) else None
        cls: Any = getattr(type(node), "_forward_cls", None)
        if cls is None or cls.__name__ != "CompiledFunction":
            continue
        if _GUARDED not in vars(cls):
            cls.backward = staticmethod(functools.partial(_backward, cls.backward, graph))
            setattr(cls, _GUARDED, True)
        return


def _backward(function: Callable[..., Any], graph: _Graph, *args: Any) -> Any:
    return _run(function, args, graph, backward=True)


def _run(function: Callable[..., Any], args: Any, graph: _Graph, *, backward: bool = False) -> Any:
    started = time.monotonic()
    _watcher.enter(sorted({one.group for one in graph.rounds}))
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
        raise _named(place, graph, backward, waited_s, error) from error
    finally:
        _watcher.leave()


def _named(
    frame: types.FrameType, graph: _Graph, backward: bool, waited_s: float, error: RuntimeError
) -> BnRewriteError:
    """The error with the sites of the collective of generated code that ``frame`` waits for."""
    index, num = _number_of_wait(frame)
    order = range(len(graph.rounds))[:: -1 if backward else 1]
    if index is not None and num == len(order):
        sites = graph.sites_at(order[index])
    else:
        names = (name for at in order for name in graph.sites_at(at).split(", "))
        sites = f"one of {', '.join(dict.fromkeys(names))}"
    group = find_group(graph.rounds[0].group)
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
