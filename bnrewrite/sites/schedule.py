"""The schedule of a converted model: what its sites communicate, and when ranks agreed on it.

All sites and owners of one conversion share a schedule. It notices when a flag changes, so that a
call has one identity to compare; only then are views made and exchanged.
"""

import copy
import hashlib
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from bnrewrite.agreement import View, agree, can_agree, default_group
from bnrewrite.differences import Line
from bnrewrite.groups import DEFAULT_GROUP, NO_GROUP, find_group
from bnrewrite.guards import errors_pass_through_dynamo, is_compiling, is_fake, runs_in_python
from bnrewrite.settings import check_enabled
from bnrewrite.sites.compiled import guard_graph
from bnrewrite.sites.ddp_buffers import DDPBuffers
from bnrewrite.sites.ddp_join import running_ddp, shadow_when_done
from bnrewrite.sites.flags import Flags, flags_of
from bnrewrite.sites.local_statistics import LocalStatistics

SCHEDULE = "_bnrewrite_schedule"
"""Attribute in which a site or owner holds its schedule."""

EVALUATES = "it evaluates (training=False) and communicates nothing"
"""What a site says of itself outside training."""

EVERY_GROUP = "*"
"""Stands, in what a member says of itself, for all groups in which the schedule communicates."""

_PATIENCE_S = 3.0
"""How long a rank that communicates nothing waits for others to say that they do."""

_PATIENCE_IN_BACKWARD_S = 8.0
"""The same for a rank that evaluates and asks for gradients: others first wait in a collective."""


def _changed() -> object:
    """Stands for a group in which the flags, as they are now, were not looked at."""
    return _changed


def _alone() -> None:
    """Stands for no group."""


_conversions = itertools.count()
_keys = itertools.count()
_living: "weakref.WeakValueDictionary[str, Schedule]" = weakref.WeakValueDictionary()


class Schedule:
    """What the sites of one conversion communicate.

    Copies and pickles begin anew: their members enter them as they are rebuilt.

    Attributes:
        passes: names of the passes that made the graphs.
        local: what it warns of.
        number: of the conversion in this process; ranks that run one program count alike.
        key: of the schedule in this process.
    """

    def __init__(
        self, passes: tuple[str, ...], local: LocalStatistics, number: int | None = None
    ) -> None:
        self.passes = passes
        self.local = local
        self.number = next(_conversions) if number is None else number
        # A string, since compilers take a number that differs between copies for a dynamic size.
        self.key = str(next(_keys))
        self.ddp_buffers = DDPBuffers()
        self._members: list[weakref.ref[Any]] = []
        # The default group in which the flags, as they are now, were looked at.
        self._seen: Callable[[], object] = _changed
        # All flags with which ranks agreed, and the default group then.
        self._agreed: tuple[Callable[[], object], set[Flags]] = (_alone, set())
        # Flags with which gradients of evaluations were asked for, and the default group then.
        self._evaluated: tuple[Callable[[], object], set[Flags]] = (_alone, set())
        # The backward that was last looked at.
        self._backward = -1
        # The DDP instance that was running then.
        self._told: Callable[[], object] = _alone
        _living[self.key] = self

    def __deepcopy__(self, memo: dict) -> "Schedule":
        return Schedule(self.passes, copy.deepcopy(self.local, memo), self.number)

    def __reduce__(self) -> tuple:
        return (Schedule, (self.passes, self.local, self.number))

    def enter(self, module: nn.Module) -> None:
        """Makes ``module``, a site or an owner, a member."""
        module.__dict__[SCHEDULE] = self
        self._members.append(weakref.ref(module))
        self._seen = _changed

    def change(self) -> None:
        """Notes that a flag of a member changes."""
        self._seen = _changed

    def before_load(self) -> None:
        """Notes that a member is about to load a state, or to reset it."""
        self.ddp_buffers.before_load()
        self._seen = _changed

    def before_collectives(self, values: Any) -> None:
        """Agrees with the other ranks if anything changed since; a member calls it in training.

        Not where ``values``, what it is given, are not there, as to estimate memory.

        Raises:
            ScheduleError: the ranks differ.
            PeerError: a rank did not answer.
        """
        if is_compiling():
            _agree_while_compiling(self.key)
        else:
            self.before_run(values)

    def before_run(self, values: Any) -> None:
        """The same where nothing is compiled, and before a compiled graph runs."""
        if self.is_news() and not is_fake(values):
            self.look()

    def after_evaluation(self, result: Any) -> None:
        """Asks the others before backward goes through ``result`` of a member that evaluates.

        A rank may evaluate by itself while others wait. One that goes backward through it trains,
        and if others train with batch statistics meanwhile, they wait for it for ever.
        """
        if (
            is_compiling()
            or not torch.is_grad_enabled()
            # A transform of torch.func has gradients of its own, of which no step consists.
            or torch._C._functorch.peek_interpreter_stack() is not None
        ):
            return
        if self._told() is not None and DistributedDataParallel._active_ddp_module is None:
            # A gradient that the DDP instance of the model does not reduce is none of a step.
            return
        world = default_group()
        if world is not None and self._seen() is not world:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    leaf.register_hook(self._before_backward)
                    break

    def _before_backward(self, _: Tensor) -> None:
        world = default_group()
        number = torch._C._current_graph_task_id()
        if (
            world is None
            or self._seen() is world
            or number == self._backward
            or not check_enabled()
        ):
            return
        # What one result of this backward tells, the others tell, too.
        self._backward = number
        members = self.members()
        if not _gradients_are_wanted(members):
            # A saliency map or an attack asks for that of an input: nobody trains.
            return
        flags = flags_of(members)
        group, known = self._evaluated
        known = known if group() is world else set()
        if flags not in known:
            views = list(self._views(members))
            evaluates = any(said == EVALUATES for _, view in views for _, said in view.others)
            if not evaluates or not all(view.empty for _, view in views):
                # Something trains; it asks by itself when it is called.
                return
            for name, view in views:
                agree(name, view, patience_s=_PATIENCE_IN_BACKWARD_S)
            self._evaluated = weakref.ref(world), known | {flags}
        self._seen = weakref.ref(world)

    def is_news(self) -> bool:
        """Whether a flag, the world or the DDP instance that runs has changed since the last look.

        This is all that a call costs that changes nothing.
        """
        if self._seen() is not default_group():
            return True
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is None or ddp is self._told():
            return False
        # It may be that of another thread.
        ddp = running_ddp()
        return ddp is not None and ddp is not self._told()

    def look(self, *, by_hand: bool = False) -> None:
        """Agrees with the other ranks unless these flags have been agreed on before."""
        world = default_group()
        members = self.members()
        flags = flags_of(members)
        if world is None:
            if any(_communicates(member) for member in members):
                self.local.warn_without_group()
        elif can_agree(world):
            self.local.warn_of_added(lambda module: schedule_of(module) is not None)
        if world is not None and (by_hand or check_enabled()):
            group, known = self._agreed
            known = known if group() is world else set()
            # What never communicates asks once, lest others wait for it.
            agreed = flags in known
            asks = by_hand or not (agreed or (known and not self.local.modes.communicate))
            if asks or self.ddp_buffers.loaded():
                # Every group is asked, whatever the others answered.
                patient = None if by_hand else _PATIENCE_S
                answers = [
                    agree(name, view, patience_s=patient if view.empty else None, by_hand=by_hand)
                    for name, view in self._views(members)
                ]
                agreed = all(answers)
                if agreed:
                    self.ddp_buffers.forget_load()
            if agreed or not self.local.modes.communicate:
                self._agreed = (weakref.ref(world), known | {flags})
            if agreed:
                self._tell_ddp(members, again=asks)
        # Weak: a group that is destroyed shall let go of its connections.
        self._seen = _alone if world is None else weakref.ref(world)
        ddp = running_ddp()
        self._told = _alone if ddp is None else weakref.ref(ddp)

    def _tell_ddp(self, members: list[Any], *, again: bool) -> None:
        """Tells the DDP instance that runs what it need not broadcast, and how to shadow.

        All ranks do so in the same forward, since a forward of DDP is one of all its ranks.
        ``again``: even if it was the last to hear of it.
        """
        ddp = running_ddp()
        if ddp is not None and (again or not self.ddp_buffers.are_left_out_of(ddp)):
            self.ddp_buffers.leave_out(ddp, members, self._before_ddp)
            shadow_when_done(ddp)

    @runs_in_python
    def _before_ddp(self, *_: Any) -> None:
        """Looks for loads before a forward of DDP that trains, as compiled members cannot."""
        if (
            not is_compiling()
            and self.is_news()
            and self.ddp_buffers.loaded()
            # A model may train with running statistics, too.
            and (torch.is_grad_enabled() or any(map(_communicates, self.members())))
        ):
            self.look()

    def members(self) -> list[Any]:
        """Living sites and owners, in the order in which they entered."""
        found = [module for one in self._members if (module := one()) is not None]
        return [m for m in dict.fromkeys(found) if m.__dict__.get(SCHEDULE) is self]

    def _views(self, members: list[Any]) -> Iterator[tuple[str, View]]:
        """Name of each group to agree in, and the view there."""
        version = sys.modules[__name__.partition(".")[0]].__version__
        head = (
            ("the version of bnrewrite", version),
            ("the passes", ", ".join(self.passes) or "none"),
        )
        lines: dict[str, list[Line]] = {EVERY_GROUP: [], NO_GROUP: []}
        for member in members:
            for group, line in member._bnrewrite_lines():
                lines.setdefault(group, []).append(line)
        names = sorted(name for name, _ in itertools.chain(*lines.values()))
        model = hashlib.sha256("\n".join([str(self.number), *names]).encode()).hexdigest()
        graphs = lines.pop(EVERY_GROUP)
        others = tuple(lines.pop(NO_GROUP))
        for name in sorted(lines) or [DEFAULT_GROUP]:
            group = default_group() if name == DEFAULT_GROUP else find_group(name)
            if can_agree(group):
                mine = lines.get(name, [])
                place = group.group_name
                yield (
                    place,
                    View(
                        model,
                        (*head, *mine, *graphs),
                        others,
                        empty=not mine,
                        loaded=self.ddp_buffers.loaded(place),
                        shared=weakref.ref(self.ddp_buffers),
                    ),
                )


def _gradients_are_wanted(members: list[Any]) -> bool:
    """Whether the backward that runs now makes gradients of parameters of ``members``.

    Where none of them can have one, others may train all the same.
    """
    parameters = {p for member in members for p in member.parameters() if p.requires_grad}
    return not parameters or any(map(_gradient_is_wanted, parameters))


def _gradient_is_wanted(parameter: Tensor) -> bool:
    with torch.enable_grad():
        node = get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # So torch says that autograd.grad() was given this very parameter.
        return True


def _communicates(member: Any) -> bool:
    """Whether a member would communicate now, if there were other ranks."""
    return any(group not in (NO_GROUP, EVERY_GROUP) for group, _ in member._bnrewrite_lines())


def living_schedule(key: str) -> Schedule | None:
    """The schedule with this key, while it lives."""
    return _living.get(key)


def schedule_of(module: nn.Module) -> Schedule | None:
    """The schedule of a site or owner, or None for any other module."""
    return module.__dict__.get(SCHEDULE)


@torch.compiler.assume_constant_result
def _agree_while_compiling(key: str) -> None:
    """Agreement when a graph is compiled: a compiler looks at the flags by itself from then on."""
    schedule = _living.get(key)
    if schedule is not None:
        guard_graph(schedule)
        if schedule.is_news():
            with errors_pass_through_dynamo():
                schedule.look()
