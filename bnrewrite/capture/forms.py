"""Forms of calls of a forward: each has a graph of its own, or none."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bnrewrite.capture.assumptions import Assumptions
from bnrewrite.errors import BnRewriteError


class Form(NamedTuple):
    """One way to call a forward.

    Attributes:
        lists: whether arguments that are asked for their type are lists, and not tensors.
        given: names of the optional arguments that are given, in order, and are not None.
    """

    lists: bool = False
    given: tuple[str, ...] = ()


PLAIN = Form()


class Refused(BnRewriteError):  # noqa: N818
    """A forward that a captured graph would change; the message says why and where.

    ``assumptions`` is what the trace had read when it ended, ``scope`` the path of the module whose
    forward was at fault.
    """

    assumptions: Assumptions | None = None
    scope: str = ""


def arguments_of(forward: Callable, form: Form) -> list[str]:
    """Names of the arguments that ``forward`` cannot do without, and of those that are given."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return [
        parameter.name
        for parameter in parameters
        if parameter.name in form.given
        or (
            parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and parameter.default is parameter.empty
        )
    ]


def num_positional(forward: Callable, *, required: bool = False) -> int:
    """How many arguments a call of ``forward`` may give by position, or ``required``: has to."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return sum(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and not (required and parameter.default is not parameter.empty)
        for parameter in parameters
    )


def call_with(forward: Callable, module: Any, names: list[str], values: Sequence[Any]) -> Any:
    """What ``forward`` makes of the arguments called ``names``, from :func:`arguments_of`."""
    first = num_positional(forward, required=True)
    others = dict(zip(names[first:], values[first:], strict=True))
    return forward(module, *values[:first], **others)
