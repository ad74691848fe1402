"""Environment variables, the only settings outside function arguments.

BNREWRITE_DISABLE=pass,...   leaves optimizing passes out of every conversion
BNREWRITE_DUMP=directory     writes every graph there, as captured and after each pass
BNREWRITE_KERNELS=aten       uses ATen's kernels instead of those in C (CPU) and Triton (GPU)
BNREWRITE_CHECK=0            ranks do not compare what they will communicate before they start
TORCH_LOGS="+bnrewrite"      logs one line per conversion (INFO) and per pass and graph (DEBUG)
"""

import os
from pathlib import Path


def disabled_passes(known: tuple[str, ...]) -> frozenset[str]:
    """Names of optimizing passes to leave out.

    Args:
        known: names of the passes that can be left out.

    Raises:
        ValueError: BNREWRITE_DISABLE names another one.
    """
    names = [name for name in os.environ.get("BNREWRITE_DISABLE", "").split(",") if name]
    for name in names:
        if name not in known:
            raise ValueError(
                f"BNREWRITE_DISABLE names {name!r}, which is not an optimizing pass. "
                f"Known passes: {', '.join(known)}."
            )
    return frozenset(names)


def dump_directory() -> Path | None:
    """Where to write graphs, or None.

    Raises:
        ValueError: BNREWRITE_DUMP names something that is not a directory and cannot become one.
    """
    name = os.environ.get("BNREWRITE_DUMP", "")
    if not name:
        return None
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"BNREWRITE_DUMP={name} cannot become a directory: {error}.") from error
    return path


def kernels_setting() -> str:
    """Which kernels to use: "auto" or "aten".

    Raises:
        ValueError: BNREWRITE_KERNELS is something else.
    """
    value = os.environ.get("BNREWRITE_KERNELS", "") or "auto"
    if value not in ("auto", "aten"):
        raise ValueError(f"BNREWRITE_KERNELS must be 'auto' or 'aten', but it is {value!r}.")
    return value


def check_enabled() -> bool:
    """Whether ranks agree on a schedule before its first collective.

    Raises:
        ValueError: BNREWRITE_CHECK is neither 0 nor 1.
    """
    value = os.environ.get("BNREWRITE_CHECK", "1")
    if value not in ("0", "1"):
        raise ValueError(f"BNREWRITE_CHECK must be 0 or 1, but it is {value!r}.")
    return value == "1"
