"""The file appears when everything passed: a temporary folder beside it, then a rename."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from bnrewrite.errors import ExportError

PROTOBUF_LIMIT = 2**31 - 2**24
"""Bytes that a protobuf message can hold, less room for the graph itself."""


@contextlib.contextmanager
def staged(target: Path | None) -> Iterator[Path]:
    """A path to write a model to; what lies there at the end takes the place of ``target``.

    The folder of the path is on the same file system, so the replacement is one rename per file.
    If the block raises, ``target`` stays as it was and nothing is left behind.
    """
    parent = None if target is None else target.parent
    folder = Path(tempfile.mkdtemp(prefix=".bnrewrite-export-", dir=parent))
    name = "model.onnx" if target is None else target.name
    try:
        yield folder / name
        if target is not None:
            # The weights first: a model must never name a file that is not there yet.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == name):
                os.replace(path, target.parent / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def uses_external_data(model: ir.Model, wanted: bool | None) -> bool:
    """Whether the weights go to a file of their own.

    Raises:
        ExportError: ``wanted`` is False and they do not fit.
    """
    if wanted:
        return True
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if size < PROTOBUF_LIMIT:
        return False
    if wanted is False:
        raise ExportError(
            f"external_data=False, but the weights take {size / 2**30:.2f} GiB and an ONNX file "
            "holds less than 2. Leave external_data at None or True."
        )
    return True


def data_name(path: Path) -> str:
    """Name of the file with the weights of the model at ``path``."""
    return f"{path.name}.data"


def write(model: ir.Model, path: Path, *, external: bool) -> None:
    """Writes ``model``, with its weights beside it if ``external``."""
    ir.save(model, path, external_data=data_name(path) if external else None)
