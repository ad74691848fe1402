"""What an error says about ranks that are about to communicate different things."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

Line = tuple[str, str]
"""Name of a site, or of another thing to agree upon, and what the rank says about it."""

_LONGEST_TEXT = 300
"""Characters of one line in an error message; names are what another rank chose to send."""


def difference(texts: dict[int, Any]) -> str:
    """The first line that differs, and what each of two ranks says about its subject."""
    (one, (mine, _)), (other, (theirs, _)) = texts.items()
    for a, b in zip_longest(mine, theirs):
        if a == b:
            continue
        # A site that only one of them has explains more than the one that came in its place.
        subject = (b if a is None or (b and not _has(mine, b[0])) else a)[0]
        said = [f"rank {rank}: {_said(text, subject)}" for rank, text in texts.items()]
        return f"First difference: {_short(subject)}. {'; '.join(said)}."
    return f"Ranks {one} and {other} differ."


def _has(lines: Any, name: str) -> bool:
    return any(line[0] == name for line in lines)


def _said(text: Any, subject: str) -> str:
    for lines in text:
        for name, said in lines:
            if name == subject:
                return _short(said)
    return "there is none"


_NO_SITES = ("the graph of ", "the passes", "the version of ")
"""How the names of lines begin that are about no site; a site may be called "the model itself"."""


def first_site(lines: Sequence[Line]) -> str:
    """The first site of ``lines`` and what is said of it."""
    sites = [f"{name}: {said}" for name, said in lines if not name.startswith(_NO_SITES)]
    return _short(sites[0]) if sites else "nothing"


def _short(text: object) -> str:
    text = str(text)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
