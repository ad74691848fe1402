"""``convert`` and its exact inverse ``revert``."""

import contextlib
import dataclasses
import gc
import logging
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm

from bnrewrite.capture.attach import detach_owner
from bnrewrite.capture.cache import Cache, Recipe
from bnrewrite.capture.candidates import more_candidates, owner_candidates
from bnrewrite.capture.functional import untraced_calls
from bnrewrite.capture.model import answer_questions, capture_and_attach, capture_from_below
from bnrewrite.capture.owner import is_owner, owner_state
from bnrewrite.capture.patches import patched
from bnrewrite.conversion import (
    CONVERSION,
    Conversion,
    note,
    note_reports,
    note_unanswered,
    settled,
    warn_of_local,
    warn_unanswered,
)
from bnrewrite.errors import BnRewriteError, CaptureError, UnsupportedBatchNorm
from bnrewrite.groups import DEFAULT_GROUP, group_name
from bnrewrite.guards import is_compiling, runs_in_python
from bnrewrite.modes import Frozen, Mode, ModeTable
from bnrewrite.naming import ITSELF
from bnrewrite.passes import optimizing_names
from bnrewrite.passes.base import UNMATCHED, PassReport, Skip, with_attribute_nodes
from bnrewrite.passes.each_sample import EACH_SAMPLE
from bnrewrite.passes.inline_children import inline_children
from bnrewrite.passes.replace_batch_norm import replace_batch_norm
from bnrewrite.sites.floor import convert_site, is_site, revert_site
from bnrewrite.sites.local_statistics import LocalStatistics
from bnrewrite.sites.schedule import Schedule
from bnrewrite.sites.undo import all_or_nothing

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


@runs_in_python
def convert(
    model: M,
    mode: str | Mode | Mapping[str, str | Mode] = "sync",
    *,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
    keep: Collection[str] = (),
    passes: Collection[str] | None = None,
    strict: bool = False,
) -> M:
    """Makes the BatchNorm layers of ``model`` distributed, in place, and returns the same object.

    Module objects, parameters, buffers, ``state_dict`` keys, hooks, attributes and ``isinstance``
    results stay the same. Call it before ``DistributedDataParallel``, ``fully_shard`` and
    ``torch.compile``. A process group is needed only when training starts. Converting again with
    the same arguments changes nothing; another mode replaces the first.

    Args:
        model: any module.
        mode: ``"sync"`` (statistics over the group), ``"shuffle"`` (those of another rank of the
            group), ``"local"`` (over the rank's own batch) or ``"frozen"`` (running statistics,
            never updated); a mode object; or a mapping from ``fnmatch`` patterns of qualified site
            names to either. The first pattern that matches wins. Sites that match no pattern are
            left alone.
        process_group: the group over which ranks exchange statistics: a process group, a
            one-dimensional ``DeviceMesh``, or None. None means the default group or, for a
            ``torch.nn.SyncBatchNorm``, the group it was made with. Modules store only its name.
        keep: qualified names, or patterns of them, of modules that must stay callable units.
        passes: names of the optimizing passes to run; None for all: ``inline_children``,
            ``share_collectives``, ``overlap_collectives``, ``fuse_epilogue``, ``overlap_backward``.
            They do not change results.
        strict: raise if something cannot be rewritten, instead of listing it in the report.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a mode or pass is unknown, a pattern matches nothing, or the process group does
            not contain this rank.
        UnsupportedBatchNorm: a site does not support the mode it was given.
        CaptureError: ``strict`` is set and something could not be rewritten.
        BnRewriteError: a compiler is tracing the call.

    A failed call leaves the model as it was.
    """
    if is_compiling():
        raise BnRewriteError(
            "convert() rewrites a model, which torch.compile and torch.export cannot trace. Call "
            "it before compiling, outside the compiled function."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, but it is {type(model).__name__}. "
            "Pass the module itself, before wrapping or compiling it."
        )
    if not isinstance(strict, bool):
        raise TypeError(
            f"strict must be True or False, but it is {type(strict).__name__} ({strict!r})."
        )
    wanted = Conversion(
        modes=ModeTable.parse(mode),
        group=group_name(process_group),
        keep=_patterns(keep, model),
        passes=optimizing_names(passes),
    )
    modules = dict(model.named_modules())
    found = [(name, one) for name, one in modules.items() if isinstance(one, _BatchNorm)]
    _check_sites(found, wanted.modes)
    with all_or_nothing(modules.values()), patched(), _without_collecting():
        _take_off(modules.values())
        conversion = _put_on(modules, found, wanted)
        # Other passes have names of other modules, too.
        report = conversion.reports.get(replace_batch_norm.__name__, PassReport())
        calls = (*report.rewritten, *report.skipped)
        names = (*(name for name, _ in found), *(one.name for one in calls))
        sites = dict.fromkeys((*names, *untraced_calls(modules.values())))
        wanted.modes.check_patterns(list(sites))
        left = [skip for skip in conversion.skipped if skip.reason not in (UNMATCHED, EACH_SAMPLE)]
        if strict and left:
            lines = "\n  ".join(f"{skip.name}: {skip.reason}" for skip in left)
            raise CaptureError(
                f"{len(left)} place(s) cannot be rewritten:\n  {lines}\n"
                "Convert with strict=False to leave them as they are."
            )
        warn_unanswered(conversion)
        warn_of_local(conversion)
        if not sites:
            left_alone = (
                f" {left[0].name or ITSELF} was left alone: {left[0].reason}." if left else ""
            )
            warnings.warn(
                f"{type(model).__name__} has nothing to convert: convert() looked for BatchNorm "
                "modules (subclasses of torch.nn's BatchNorm1d, 2d, 3d and SyncBatchNorm) and for "
                f"calls to torch.nn.functional.batch_norm on activations.{left_alone}",
                stacklevel=2,
            )
    return model


@runs_in_python
def revert(model: M) -> M:
    """Undoes :func:`convert` exactly: original classes and forwards, same parameters.

    Args:
        model: a converted module. A module that is not converted is returned unchanged.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {type(model).__name__}.")
    modules = list(model.modules())
    with all_or_nothing(modules):
        _take_off(modules)
    return model


def graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """Returns the rewritten training graph of every module of ``model`` that runs one.

    The graphs are copies, to read (``print_readable()``) and to run further passes on. Their
    BatchNorm nodes are calls to ``torch.ops.bnrewrite``.

    Args:
        model: a converted module.

    Returns:
        The graphs, keyed by the qualified name of the module; ``""`` is the model itself. Empty if
        the model is not converted or all of its sites are on their own.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {type(model).__name__}.")
    return {
        name: fx.GraphModule(module, with_attribute_nodes(state.train.graph))
        for name, module in model.named_modules()
        if is_owner(module) and (state := owner_state(module)) is not None
    }


def _patterns(keep: object, model: nn.Module) -> tuple[str, ...]:
    if isinstance(keep, str) or not isinstance(keep, (tuple, list, set, frozenset)):
        raise TypeError(
            f"keep must be a sequence of qualified names or patterns, but it is "
            f"{type(keep).__name__} ({keep!r})."
        )
    modules = [*model.named_modules(remove_duplicate=False)] if keep else []
    kept: set[int] = set()
    for pattern in keep:
        if not isinstance(pattern, str):
            raise TypeError(f"keep must hold strings, but one is {type(pattern).__name__}.")
        found = {id(module) for name, module in modules if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"the pattern {pattern!r} in keep matches no module of the model.")
        kept |= found
    # By whatever name a forward calls them.
    others = (name for name, module in modules if id(module) in kept)
    return tuple(dict.fromkeys((*keep, *others)))


def _check_sites(found: list[tuple[str, _BatchNorm]], modes: ModeTable) -> None:
    for name, module in found:
        if isinstance(modes.find(name), Frozen) and module.running_mean is None:
            raise UnsupportedBatchNorm(
                f"{name}: mode 'frozen' needs running statistics, but the layer has none "
                "(track_running_stats=False). Give it another mode."
            )


def _put_on(
    modules: dict[str, nn.Module], found: list[tuple[str, _BatchNorm]], wanted: Conversion
) -> Conversion:
    sites = tuple(name for name, _ in found if wanted.modes.find(name) is not None)
    conversion = dataclasses.replace(wanted, reports={}, sites=sites, skipped=[], unanswered=[])
    model = modules[""]
    local = LocalStatistics(weakref.ref(model), wanted.modes)
    schedule = Schedule(conversion.passes, local)
    for name, module in found:
        mode = wanted.modes.find(name)
        if mode is None:
            conversion.skipped.append(Skip(name, UNMATCHED))
        else:
            convert_site(module, name, mode, _group_of(module, wanted.group), schedule)
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule) and module.original_name.startswith(
            ("BatchNorm", "SyncBatchNorm")
        ):
            conversion.skipped.append(Skip(name, "it is a TorchScript module"))
    cache = Cache()
    tried = owner_candidates(modules)
    recipe = Recipe("", wanted.modes, wanted.group, wanted.keep, wanted.passes)
    captured = capture_from_below(modules, tried, recipe, cache, schedule)
    for name in tried:
        note(name, tried[name], captured[name], conversion)
    for name, one in captured.items():
        if name in tried:
            continue
        note_reports(one, conversion)
        if one.refused is not None:
            # Its children are distributed by themselves, and share nothing.
            inlining = conversion.reports.setdefault(inline_children.__name__, PassReport())
            skip = Skip(name or ITSELF, one.refused, owner=None)
            inlining.skipped.append(skip)
    # A site that its holder does not call may be called from further up: self.encoder.bn(x).
    for name, module in more_candidates(modules, tried, settled(conversion)):
        if name not in captured:
            named = dataclasses.replace(recipe, name=name)
            captured[name] = capture_and_attach(module, named, cache, schedule)
            note_reports(captured[name], conversion)
    for one in answer_questions(modules, captured, schedule):
        note_unanswered(one, conversion)
    model.__dict__[CONVERSION] = conversion
    log.info(
        "%s: %d BatchNorm modules, %d sites in graphs, %d places left",
        type(model).__name__,
        len(found),
        len(settled(conversion)),
        len(conversion.skipped),
    )
    return conversion


def _group_of(module: _BatchNorm, group: str) -> str:
    """The group asked for, else the one that a ``torch.nn.SyncBatchNorm`` was made with."""
    own = getattr(module, "process_group", None) if isinstance(module, nn.SyncBatchNorm) else None
    return own.group_name if own is not None and group == DEFAULT_GROUP else group


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Leaves Python's search for cycles until later: graphs are many objects, and they stay."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _take_off(modules: Collection[nn.Module]) -> None:
    for module in modules:
        if is_owner(module):
            detach_owner(module)
        if is_site(module):
            revert_site(module)
        # A part may have been converted by itself, before or after the whole.
        module.__dict__.pop(CONVERSION, None)
