"""What a conversion was asked for and what it found, as it is noted on the model."""

import dataclasses
import warnings

from torch import nn

from bnrewrite.capture.cache import Capture
from bnrewrite.capture.candidates import mentions_batch_norm
from bnrewrite.capture.functional import CALLS, TOLD
from bnrewrite.capture.model import Unanswered
from bnrewrite.modes import ModeTable
from bnrewrite.naming import ITSELF
from bnrewrite.passes.base import PassReport, Skip
from bnrewrite.passes.replace_batch_norm import LOCAL, replace_batch_norm
from bnrewrite.sites.classes import original_class
from bnrewrite.sites.floor import is_site, site_state

OWN_STATISTICS = (
    "is not distributed: its forward computes its own statistics, without torch's BatchNorm"
)

CONVERSION = "_bnrewrite_conversion"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What ``convert`` was asked for and what it found, in plain values.

    Attributes:
        modes: which mode each site gets.
        group: name of the process group of communicating sites.
        keep: patterns of modules that stay callable units.
        passes: names of the optimizing passes that ran.
        reports: what each pass did, over all owners, by pass name.
        sites: names of the BatchNorm modules that were converted.
        skipped: what was left as it was, with the reasons.
        unanswered: forwards among these that ask for classes which conversion changed.
    """

    modes: ModeTable
    group: str
    keep: tuple[str, ...]
    passes: tuple[str, ...]
    reports: dict[str, PassReport] = dataclasses.field(default_factory=dict, compare=False)
    sites: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    skipped: list[Skip] = dataclasses.field(default_factory=list, compare=False)
    unanswered: list[Unanswered] = dataclasses.field(default_factory=list, compare=False)


def conversion_of(model: nn.Module) -> Conversion | None:
    """What ``model`` was converted with, or None."""
    return model.__dict__.get(CONVERSION)


def settled(conversion: Conversion) -> set[str]:
    """Names of sites that are in a graph, or that were left with a reason."""
    report = conversion.reports.get(replace_batch_norm.__name__, PassReport())
    return {one.name for one in (*report.rewritten, *report.skipped)}


def note_reports(captured: Capture, conversion: Conversion) -> None:
    """Notes what the passes did with one graph."""
    for pass_name, report in captured.reports.items():
        conversion.reports.setdefault(pass_name, PassReport()).add(report)
        # What an optimizing pass leaves is distributed all the same.
        if pass_name == replace_batch_norm.__name__:
            conversion.skipped.extend(report.skipped)


def note(name: str, module: nn.Module, captured: Capture, conversion: Conversion) -> None:
    """Notes what came of an owner.

    That a module further up cannot be traced would be no news: it may not touch a site at all.
    """
    note_reports(captured, conversion)
    if is_site(module) and site_state(module).by_itself:
        code = getattr(original_class(module).forward, "__code__", None)
        where = None if code is None else f"{code.co_filename}:{code.co_firstlineno}"
        conversion.skipped.append(Skip(name or ITSELF, OWN_STATISTICS, where))
    if captured.refused is None:
        return
    floor = f"; {TOLD} communicate one by one, and are not counted" if _tells(module) else ""
    conversion.skipped.append(Skip(name or ITSELF, f"{captured.refused}{floor}"))
    if not is_site(module) and mentions_batch_norm(module):
        warnings.warn(
            f"{name or ITSELF} ({type(module).__name__}) {captured.refused}, and its class "
            f"mentions batch_norm. {_telling(module)}To share them, use a BatchNorm module there, "
            "or make the forward traceable.",
            stacklevel=4,
        )


def _tells(module: nn.Module) -> bool:
    """Whether calls of ``F.batch_norm`` by a forward without a graph may be told as sites."""
    calls = vars(module).get(CALLS)
    return calls is not None and calls.other is not None


def _telling(module: nn.Module) -> str:
    """What becomes of calls of ``F.batch_norm`` in a forward without a graph."""
    if not _tells(module):
        return (
            "If its forward calls torch.nn.functional.batch_norm on activations, that call uses "
            "local statistics. "
        )
    return (
        f"There, {TOLD} communicate one by one, unless in a checkpoint, an autograd.Function or "
        "no_grad; any other call on activations uses local statistics. "
    )


def note_unanswered(question: Unanswered, conversion: Conversion) -> None:
    """Notes that a forward asks for a class that conversion changed, and runs as it is."""
    reason = (
        f"asks for the class of {question.child}, a {question.cls.__name__}, which conversion "
        f"changes, and has no graph to give the original answer: it {question.reason}"
    )
    conversion.skipped.append(Skip(question.name or ITSELF, reason, question.where))
    conversion.unanswered.append(question)


def warn_of_local(conversion: Conversion) -> None:
    """Warns of calls that evaluate BatchNorm and cannot be distributed."""
    for skip in conversion.skipped:
        if skip.reason.endswith(LOCAL):
            place = f" ({skip.where})" if skip.where else ""
            warnings.warn(f"{skip.name} {skip.reason}{place}.", stacklevel=3)


def warn_unanswered(conversion: Conversion) -> None:
    """Warns of forwards that may compute something else now, since they ask for classes."""
    for question in conversion.unanswered:
        kind = question.cls.__name__
        warnings.warn(
            f"{question.name or ITSELF} asks for the class of {question.child} "
            f"({question.where}). Conversion made that a subclass of {kind}, and no graph can "
            f"give the original answer, because the forward {question.reason}. Its results may "
            f"change. Use isinstance(..., {kind}) there, or compare the name of the class.",
            stacklevel=3,
        )
