"""The ranks of a group compare what they are about to communicate before they do.

Ranks whose collectives differ wait for each other, or mix unrelated numbers. So before the first
collective of a changed schedule, each rank publishes its view in the group's store, and the first
rank of the group compares them:

    every rank      publishes the digest and the text of its view of round k
    rank 0          compares the digests and publishes the verdict of round k
    every rank      reads the verdict: continues, or raises and shows both texts
    every rank      takes over what rank 0 holds, if a rank has loaded something else

Unlike a collective, a store answers within its timeouts whatever the other ranks do. Only plain
text is sent, and nothing that is read is executed or unpickled.
"""

import dataclasses
import functools
import hashlib
import json
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnrewrite.differences import Line, difference, first_site
from bnrewrite.errors import PeerError, ScheduleError
from bnrewrite.groups import timeout_s

_GRACE_S = 1.5
"""How long a view with collectives outlives one of the same model without: the rank may be late."""

_SAME_AFTER_LOAD = ["loaded"]
"""Verdict of a round in which the ranks agree and some have loaded; else it names who differs."""

_LOADED = "This rank has loaded a state_dict since its last step; load on all ranks. "

_CANNOT_TAKE_OVER: Line = (
    "the state",
    "nothing was loaded, and compiled code that waits cannot be corrected: load on all ranks",
)


class Shared:
    """Tensors of one model that are equal on all ranks of a group, whose ranks number it alike."""

    def __init__(self) -> None:
        # In which round of a group its ranks first agreed about the model: copies look the same.
        self.numbers: dict[_Group, int] = {}

    def tensors(self, group: str) -> list[Tensor]:
        """The tensors, in the same order on all ranks of ``group``."""
        raise NotImplementedError


def _nothing() -> None:
    """Stands for nothing to keep equal."""


@dataclasses.dataclass(frozen=True)
class View:
    """What one rank is about to communicate in one group.

    Attributes:
        model: which model it is about, equal for conversions of one model with other modes.
        lines: what must be the same on all ranks, in order.
        others: what need not, to explain a difference.
        empty: nothing is communicated. Such a view waits for nobody for long, since the ranks may
            have other things to do.
        loaded: the rank has loaded a state since, which the others may have done or not.
        shared: what must stay equal on all ranks, if it lives.
    """

    model: str
    lines: tuple[Line, ...]
    others: tuple[Line, ...] = ()
    empty: bool = False
    loaded: bool = False
    shared: Callable[[], "Shared | None"] = _nothing

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the lines."""
        return hashlib.sha256(json.dumps(self.lines).encode()).hexdigest()

    def number(self, place: "_Group") -> int:
        """Of what is shared, or -1 if the ranks have not agreed about it yet."""
        shared = self.shared()
        return -1 if shared is None else shared.numbers.get(place, -1)

    def record(self, place: "_Group", *, final: bool) -> bytes:
        """What the others compare."""
        number = self.number(place) if self.loaded else -1
        return json.dumps([self.digest, self.model, final, number]).encode()

    def text(self) -> bytes:
        """What the others read if they differ."""
        return json.dumps([self.lines, self.others]).encode()


class _Group:
    """This process's place in a group, and how many rounds the group has behind it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        # Weak: a group that is destroyed shall let go of its connections.
        self._group = weakref.ref(group)
        self.name = group.group_name
        self.rank = group.rank()
        self.size = group.size()
        self.timeout_s = timeout_s(group)
        self.round = 0
        # Threads of this process take their turns.
        self.lock = threading.RLock()
        self.last: View | None = None
        # The last view of each model, since ranks may ask about another one than the last.
        self.views: weakref.WeakKeyDictionary[Shared, View] = weakref.WeakKeyDictionary()

    @property
    def _store(self) -> Any:
        return dist.distributed_c10d._get_process_group_store(self._group())  # pyright: ignore

    def is_of(self, group: dist.ProcessGroup) -> bool:
        return self._group() is group

    def __str__(self) -> str:
        return f"{describe_group(self.name)} ({self.size} ranks, this is rank {self.rank})"

    def key(self, what: object) -> str:
        return f"bnrewrite/{self.round}/{what}"

    def has(self, what: object) -> bool:
        return self._store.check([self.key(what)])

    def get(self, what: object) -> Any:
        return json.loads(self._store.get(self.key(what)))

    def set(self, what: object, value: bytes) -> None:
        # Every backend of store takes text; some bindings take no bytes.
        self._store.set(self.key(what), value.decode())

    def close_round(self, num_tensors: int = 0) -> None:
        """Goes on to the next round; the last rank to leave this one clears it up."""
        if self._store.add(self.key("done"), 1) == self.size:
            for rank in range(self.size):
                self._store.delete_key(self.key(rank))
                self._store.delete_key(self.key(f"{rank}/text"))
            for what in ("open", "verdict", "done", *(f"state/{i}" for i in range(num_tensors))):
                self._store.delete_key(self.key(what))
        self.round += 1


_groups: dict[str, _Group] = {}
_making = threading.Lock()


def _place(name: str) -> _Group:
    """What is known of the group called ``name``; names return when a world is formed anew."""
    group = dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportArgumentType]
    with _making:
        known = _groups.get(name)
        if known is None or not known.is_of(group):
            known = _groups[name] = _Group(group)
        return known


def agree(name: str, view: View, *, patience_s: float | None = None, by_hand: bool = False) -> bool:
    """Compares ``view`` with those of the other ranks of the group called ``name``.

    Args:
        name: of the group, which has more than one rank.
        view: of this rank.
        patience_s: give up after so many seconds, without an error; None for the timeout of the
            group, after which the ranks that are missing are an error.
        by_hand: even a view without collectives is final, since the user asks all ranks.

    Returns:
        Whether all ranks have answered, and the same.

    Raises:
        ScheduleError: the ranks differ; it is raised on all of them.
        PeerError: a rank did not answer, or the store is gone.
    """
    place = _place(name)
    try:
        with place.lock:
            if place.last is not None and place.has("verdict"):
                # This rank gave up waiting in the round; the others have ended it since.
                _conclude(place)
            place.last = view
            shared = view.shared()
            if shared is not None:
                place.views[shared] = view
            place.set(f"{place.rank}/text", view.text())
            place.set(place.rank, view.record(place, final=by_hand or not view.empty))
            place.set("open", b"1")
            return _settle(place, view, patience_s, by_hand=by_hand)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise PeerError(
            f"the store of {place} does not answer, so the ranks cannot compare "
            f"what they communicate; the rank that hosts the store may have died: {error}"
        ) from error


def join_open_round(name: str, *, may_take_over: bool = True) -> None:
    """Tells ranks that wait for an agreement what this one does meanwhile: wait in a collective.

    Called by a rank whose collective takes suspiciously long. If others have opened a round they
    have left the schedule that this rank follows, and all of them shall hear of it; or they have
    loaded a state, and all of them take over that of rank 0.

    Args:
        name: of the group.
        may_take_over: whether the state of this rank may change now. Else a load is a difference.

    Raises:
        ScheduleError: the others follow another schedule.
    """
    place = _place(name)
    # Another thread of this process may be asking the others.
    if not place.lock.acquire(blocking=False):
        return
    try:
        if place.last is not None and place.has("open") and not place.has(place.rank):
            view = _view_asked_about(place, may_take_over=may_take_over) or place.last
            agree(name, view)
    except (dist.DistStoreError, dist.DistNetworkError):
        # The collective will fail by itself, with a better message.
        return
    finally:
        place.lock.release()


def _view_asked_about(place: _Group, *, may_take_over: bool) -> View | None:
    """This rank's view of the model about which another one has opened the round."""
    asked = (place.get(rank) for rank in range(place.size) if place.has(rank))
    digest, model, _, *number = next(asked, ("", "", False))
    views = list(place.views.values())
    if any(n >= 0 for n in number):
        found = [view for view in views if view.number(place) in number]
        if not found or not may_take_over:
            found = [
                dataclasses.replace(view, lines=(*view.lines, _CANNOT_TAKE_OVER))
                for view in found or views
            ]
    else:
        found = [view for view in views if view.digest == digest]
        found = found or [view for view in views if view.model == model]
    return found[-1] if found else None


def _settle(place: _Group, view: View, patience_s: float | None, *, by_hand: bool) -> bool:
    wait_s = place.timeout_s if patience_s is None else patience_s
    start = time.monotonic()
    pause_s = 0.0005
    # The first rank hears all others, each of them only the first one.
    missing = set(range(place.size)) - {place.rank} if place.rank == 0 else {0}
    loaded = view.loaded
    while not place.has("verdict"):
        waited_s = time.monotonic() - start
        doubtful = False
        for rank in sorted(missing):
            if not place.has(rank):
                continue
            digest, model, final, *number = place.get(rank)
            if digest == view.digest:
                missing.discard(rank)
                loaded = loaded or any(n >= 0 for n in number)
            elif (final and (by_hand or not view.empty)) or (
                # One of the two communicates nothing. About another model that says nothing, about
                # the same one it is a difference, unless the rank is still on its way here.
                model == view.model and waited_s > _GRACE_S
            ):
                place.set("verdict", json.dumps([rank, place.rank]).encode())
            else:
                doubtful = doubtful or model == view.model
        if place.rank == 0 and not missing:
            place.set("verdict", json.dumps(_SAME_AFTER_LOAD if loaded else []).encode())
        elif waited_s > (max(wait_s, 2 * _GRACE_S) if doubtful else wait_s):
            break
        else:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)
    if place.has("verdict"):
        return _conclude(place)
    if patience_s is not None:
        return False
    who = f"rank(s) {sorted(missing)}" if missing else "some ranks"
    raise PeerError(
        f"{who} of {place} did not join the comparison of BatchNorm collectives within "
        f"{wait_s:.0f} s: they died, stalled, or run something else. "
        f"{_LOADED if view.loaded else ''}Next on this rank: {first_site(view.lines)}."
    )


def _conclude(place: _Group) -> bool:
    verdict = place.get("verdict")
    if verdict in ([], _SAME_AFTER_LOAD):
        view: Any = place.last
        shared = view.shared()
        tensors = []
        if shared is not None:
            shared.numbers.setdefault(place, place.round)
            tensors = shared.tensors(place.name) if verdict else []
        _take_over(place, tensors)
        place.close_round(len(tensors))
        return True
    texts = {rank: place.get(f"{rank}/text") for rank in sorted(verdict)}
    place.close_round()
    raise ScheduleError(
        f"the ranks of {place} are about to run different collectives and would wait for each "
        f"other forever. {difference(texts)} Give all ranks the same model, conversion, flags, "
        "hooks, arguments and version of bnrewrite; bnrewrite.check(model) compares them."
    )


def _take_over(place: _Group, tensors: list[Tensor]) -> None:
    """Gives ``tensors`` the values of rank 0, through the store: ranks may wait in collectives."""
    for index, tensor in enumerate(tensors):
        key = f"state/{index}"
        if place.rank == 0:
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            place.set(key, json.dumps(bytes(values.tolist()).hex()).encode())
        else:
            values = torch.frombuffer(bytearray.fromhex(place.get(key)), dtype=torch.uint8)
            with torch.no_grad():
                tensor.copy_(values.view(tensor.dtype).view(tensor.shape))


def describe_group(name: str) -> str:
    """How messages call the group called ``name``."""
    group = default_group()
    is_default = group is not None and group.group_name == name
    return "the default process group" if is_default else f"the process group {name!r}"


def can_agree(group: dist.ProcessGroup) -> bool:
    """Whether ``group`` has other ranks to agree with; those of a fake group do not exist."""
    return group.size() > 1 and dist.get_backend(group) != "fake"


def default_group() -> Any:
    """The default process group of this process, or None."""
    return dist.distributed_c10d._world._default_pg
