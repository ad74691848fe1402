"""The floor: a BatchNorm module whose own forward calls the op.

Whatever path of whatever code reaches the module, the evaluation is distributed.
"""

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bnrewrite.differences import Line
from bnrewrite.errors import BnRewriteError, GroupError, UnsupportedBatchNorm
from bnrewrite.groups import NO_GROUP, active_group, find_group, name_in
from bnrewrite.modes import Frozen, Mode, Shuffle, Sync
from bnrewrite.naming import ITSELF, remember
from bnrewrite.sites.classes import (
    Converted,
    change_class,
    converted_class,
    has_frozen_weight,
    original_class,
    restore_class,
)
from bnrewrite.sites.evaluate import evaluate, site_number
from bnrewrite.sites.schedule import EVALUATES, SCHEDULE, Schedule, schedule_of
from bnrewrite.sites.tracing import Tracing, tracer_here

_STATE = "_bnrewrite_site"


@dataclasses.dataclass(frozen=True)
class SiteState:
    """What a converted BatchNorm module knows: plain values only, so it copies and pickles.

    Attributes:
        name: qualified name in the converted model.
        mode: the mode of the site.
        group: name of its process group, or "" if its mode does not communicate.
        by_itself: whether the forward of its class computes statistics of its own, and leaves
            nothing to distribute.
        sync_group: name of the group that a ``torch.nn.SyncBatchNorm`` held before conversion.
        number: of the site, from its name; random schedules of different sites differ by it.
    """

    name: str
    mode: Mode
    group: str
    sync_group: str | None = None
    by_itself: bool = False
    number: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", site_number(self.name))

    def named(self, error: UnsupportedBatchNorm) -> UnsupportedBatchNorm:
        """The error with the name of this site in front."""
        return UnsupportedBatchNorm(f"{self.name or ITSELF}: {error}")


SITE_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""Tensor arguments of the op, by their names in a BatchNorm module."""


def own_batch_norm(x: Tensor) -> Tensor:
    """Marks, in a fresh graph, the call of torch's BatchNorm forward by a subclass of BatchNorm."""
    raise AssertionError("a marker is replaced before its graph runs")


def checked_input(check: Any, x: Tensor) -> Tensor:
    """``x`` after the ``_check_input_dim`` of its BatchNorm module has accepted it."""
    check(x)
    return x


def call_in_trace(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``module.forward(...)`` becomes in a graph that is captured: a call of the module."""
    if has_hooks(module):
        Tracing.tracer.refuse("calls forward() of a module with hooks, which only a call would run")
    return module(*args, **kwargs)


class SiteForward(Converted):
    """``forward`` of a converted BatchNorm module."""

    _bnrewrite_site: SiteState
    _bnrewrite_schedule: Schedule

    @property
    def _bnrewrite_number(self) -> int:
        return self._bnrewrite_site.number

    def _bnrewrite_lines(self) -> list[tuple[str, Line]]:
        """What the ranks of a group must have in common about this site."""
        module: Any = self
        state = self._bnrewrite_site
        name = state.name or ITSELF
        if state.by_itself:
            return [(NO_GROUP, (name, "its own forward, which communicates nothing"))]
        if state.group == NO_GROUP:
            return [(NO_GROUP, (name, f"{state.mode}, which communicates nothing"))]
        if not module.training:
            return [(NO_GROUP, (name, EVALUATES))]
        gradient = ", its weight frozen" if has_frozen_weight(module) else ""
        return [(state.group, (name, f"{state.mode}, {module.num_features} channels{gradient}"))]

    @staticmethod
    def _bnrewrite_becomes(become: type[nn.Module]) -> type[nn.Module]:
        return converted_class(become, _recipe(become))

    def _bnrewrite_equal_buffers(self, group: str) -> list[Tensor]:
        """Buffers that are equal on all ranks of ``group``, since all update them alike."""
        module: Any = self
        state = self._bnrewrite_site
        follows_all = isinstance(state.mode, Sync) or (
            isinstance(state.mode, Shuffle) and state.mode.running == "group"
        )
        active = name_in(active_group(state.group, True))
        # The own forward of a subclass may update them by itself.
        if not follows_all or has_own_forward(module) or active != group:
            return []
        buffers = (module.running_mean, module.running_var, module.num_batches_tracked)
        return [buffer for buffer in buffers if buffer is not None]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        module: Any = self
        if is_site(module):
            # A copy, or what was loaded.
            remember(module, self._bnrewrite_site.name)

    def reset_running_stats(self) -> None:
        """Resets the buffers; where only some ranks do, those of rank 0 win, as after a load."""
        module: Any = self
        schedule = schedule_of(module)
        if schedule is not None:
            schedule.before_load()
        super().reset_running_stats()  # pyright: ignore

    def _check_input_dim(self, input: Tensor) -> None:
        # While a subclass that checks its input is traced, there are no dimensions to check.
        if not isinstance(input, fx.Proxy):
            super()._check_input_dim(input)  # pyright: ignore

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes ``input`` (N, C, *) with the mode and group of the site."""
        if Tracing.tracer is not None and tracer_here() is not None:
            if not has_own_forward(self):  # pyright: ignore
                return call_in_trace(self, (input,), {})
            # A subclass that calls super().forward() is being traced.
            return Tracing.tracer.create_proxy("call_function", own_batch_norm, (input,), {})
        module: Any = self
        if not is_site(module):
            if not isinstance(module, SiteForward):
                # Somebody has kept the method from when it was converted.
                return type(module).forward(module, input)
            # Made of a converted module's class by somebody else, so not converted itself.
            return super().forward(input)  # pyright: ignore
        state = self._bnrewrite_site
        module._check_input_dim(input)
        training = module.training and not isinstance(state.mode, Frozen)
        if training:
            self._bnrewrite_schedule.before_collectives(input)
        arguments = (
            input, module.weight, module.bias, module.running_mean, module.running_var,
            module.num_batches_tracked, training, module.track_running_stats, module.momentum,
            module.eps,
        )  # fmt: skip
        try:
            y = evaluate(state.mode, state.number, active_group(state.group, training), arguments)
        except UnsupportedBatchNorm as error:
            raise state.named(error) from error
        if not training:
            self._bnrewrite_schedule.after_evaluation(y)
        return y


class BatchNormSite(SiteForward, _BatchNorm):
    """Stands between a direct subclass of ``_BatchNorm`` and its base."""


class BatchNorm1dSite(SiteForward, nn.BatchNorm1d):
    """Stands between a subclass of ``BatchNorm1d`` and its base."""


class BatchNorm2dSite(SiteForward, nn.BatchNorm2d):
    """Stands between a subclass of ``BatchNorm2d`` and its base."""


class BatchNorm3dSite(SiteForward, nn.BatchNorm3d):
    """Stands between a subclass of ``BatchNorm3d`` and its base."""


class SyncBatchNormSite(SiteForward, nn.SyncBatchNorm):
    """Stands between a subclass of ``SyncBatchNorm`` and its base."""


_SITES: dict[type[nn.Module], type[SiteForward]] = {
    nn.BatchNorm1d: BatchNorm1dSite,
    nn.BatchNorm2d: BatchNorm2dSite,
    nn.BatchNorm3d: BatchNorm3dSite,
    nn.SyncBatchNorm: SyncBatchNormSite,
    _BatchNorm: BatchNormSite,
}


def has_own_forward(module: nn.Module) -> bool:
    """Whether the class of a BatchNorm module overrides torch's forward."""
    return _is_own(original_class(module).forward)


_OF_TORCH = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _is_own(forward: Any) -> bool:
    return forward not in _OF_TORCH


def floor_recipe(module: nn.Module) -> tuple[type | None, ...]:
    """Bases of the converted class: the op's forward takes the place of torch's own."""
    return _recipe(original_class(module))


def _recipe(cls: type[nn.Module]) -> tuple[type | None, ...]:
    if not _is_own(cls.forward):
        return (SiteForward, None)
    replaced = next(base for base in cls.__mro__ if "forward" in vars(base))
    if replaced in (_BatchNorm, nn.SyncBatchNorm, *_SITES):
        raise BnRewriteError(
            f"{cls.__name__}: {replaced.__name__}.forward of torch.nn has been replaced, so layers "
            "of this class are not torch's BatchNorm any more. Convert before it is replaced, or "
            "give that forward to a subclass and use this in the model."
        )
    for base in cls.__mro__:
        if base in _SITES:
            return (None, _SITES[base])
    raise TypeError(f"{cls.__name__} is not a BatchNorm module")


def is_site(module: nn.Module) -> bool:
    """Whether ``module`` is a converted BatchNorm module."""
    return _STATE in module.__dict__


def site_state(module: nn.Module) -> SiteState:
    """The state of a converted BatchNorm module."""
    return module.__dict__[_STATE]


def convert_site(module: _BatchNorm, name: str, mode: Mode, group: str, schedule: Schedule) -> None:
    """Turns a BatchNorm module into a site, in place."""
    sync_group = None
    if isinstance(module, nn.SyncBatchNorm) and module.process_group is not None:
        sync_group = module.process_group.group_name
        # A process group cannot be copied or pickled; the name can.
        module.process_group = None
    module.__dict__[_STATE] = SiteState(
        name=name,
        mode=mode,
        group=group if mode.communicates else NO_GROUP,
        sync_group=sync_group,
    )
    change_class(module, floor_recipe(module))
    schedule.enter(module)
    remember(module, name)


def note_own_statistics(module: nn.Module) -> None:
    """Notes that the forward of a site leaves nothing to distribute."""
    module.__dict__[_STATE] = dataclasses.replace(site_state(module), by_itself=True)


def is_uninitialized(module: nn.Module) -> bool:
    """Whether ``module`` is a lazy BatchNorm that has not seen its first batch."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def revert_site(module: nn.Module) -> None:
    """Exact inverse of :func:`convert_site`, as long as the group of a SyncBatchNorm lives."""
    state = site_state(module)
    restore_class(module)
    del module.__dict__[_STATE]
    del module.__dict__[SCHEDULE]
    if state.sync_group is None:
        return
    try:
        module.__dict__["process_group"] = find_group(state.sync_group)
    except GroupError:
        warnings.warn(
            f"{state.name or ITSELF}: the process group {state.sync_group!r} that the "
            f"{type(module).__name__} was made with no longer exists in this process. Its "
            "process_group is now None, the default group.",
            stacklevel=4,
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward."""
    return has_hooks_of_its_own(module) or has_global_hooks()


def has_hooks_of_its_own(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward, where calling others does not."""
    return bool(
        has_forward_hooks(module)
        or (module._forward_pre_hooks and _act(module._forward_pre_hooks))
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module.__dict__.get("_compiled_call_impl") is not None
    )


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether something sees, and may exchange, what calling ``module`` gives."""
    return bool(module._forward_hooks) and _act(module._forward_hooks)


def has_global_hooks() -> bool:
    """Whether calling any module does more than its forward."""
    return bool(torch.nn.modules.module._has_any_global_hook()) and any(
        _act(getattr(torch.nn.modules.module, name))
        for name in (
            "_global_backward_hooks",
            "_global_backward_pre_hooks",
            "_global_forward_hooks",
            "_global_forward_pre_hooks",
        )
    )


def _act(hooks: dict[int, Any]) -> bool:
    """Whether any of ``hooks`` may do something: torch's own trackers of modules only watch."""
    return any(
        not str(getattr(hook, "__module__", "")).startswith(_WATCHERS) for hook in hooks.values()
    )


_WATCHERS = (
    "torch.distributed._tools.",
    "torch.distributed.tensor.debug.",
    "torch.utils.module_tracker",
)
