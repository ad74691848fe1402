"""The file that an export is to write, checked before the model runs."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bnrewrite.errors import ExportError


def check_path(path: object) -> Path | None:
    """The file to write, with symbolic links followed; None for no file.

    Raises:
        TypeError: it is not a path.
        ExportError: nothing can be written there.
    """
    if path is None:
        return None
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path or None, but it is {type(path).__name__}.")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError("path must be a str path, but it is bytes.")
    if not text:
        raise ExportError("path is empty. Give a file name, or None to get only the model.")
    target = Path(os.path.realpath(text))
    if os.path.isdir(target) or text.endswith(("/", os.sep)):
        raise ExportError(f"path is a directory: {text!r}. Give the name of a file in it.")
    if not os.path.isdir(target.parent):
        raise ExportError(f"the directory of path does not exist: {text!r}. Create it first.")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ExportError(
            f"path is not a regular file but a pipe, device or socket: {text!r}. It would be "
            "replaced. Give a file name, or None to get only the model."
        )
    _try_to_write(target, text)
    return target


def data_name(path: Path) -> str:
    """Name of the file with the weights of the model at ``path``."""
    return f"{path.name}.data"


@contextlib.contextmanager
def folder_beside(target: Path | None) -> Iterator[Path]:
    """A temporary folder on the file system of ``target``, or anywhere without one."""
    with tempfile.TemporaryDirectory(
        prefix=".bnrewrite-export-",
        dir=None if target is None else target.parent,
        ignore_cleanup_errors=True,
    ) as folder:
        yield Path(folder)


def _try_to_write(target: Path, text: str) -> None:
    """Does what the end of an export does, since permissions alone do not say all."""
    try:
        with folder_beside(target) as folder:
            (folder / target.name).touch()
    except OSError as error:
        raise ExportError(
            f"nothing can be written beside path {text!r}: {error.strerror}. Choose another path."
        ) from error
