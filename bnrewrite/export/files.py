"""The file appears when everything passed: a temporary folder beside it, then a rename."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import external_data_helper

from bnrewrite.errors import ExportError
from bnrewrite.export.paths import data_name, folder_beside

log = logging.getLogger(__name__)

PROTOBUF_LIMIT = 2**31 - 2**24
"""Bytes that a protobuf message can hold, less room for the graph itself."""


@contextlib.contextmanager
def staged(target: Path | None) -> Iterator[Path]:
    """A path to write a model to; what lies there at the end takes the place of ``target``.

    The folder of the path is on the same file system, so the replacement is one rename per file.
    If the block raises, ``target`` stays as it was and nothing is left behind. Weights that the
    model at ``target`` kept beside it go with it.
    """
    name = "model.onnx" if target is None else target.name
    with folder_beside(target) as folder:
        yield folder / name
        if target is not None:
            replaced = _weights_beside(target)
            # The weights first: a model must never name a file that is not there yet.
            paths = sorted(folder.iterdir(), key=lambda path: path.name == name)
            for path in paths:
                place = target.parent / path.name
                if path.name != name and place.exists() and place != replaced:
                    raise ExportError(
                        f"the weights would go to {str(place)!r}, which exists and does not belong "
                        f"to a model at {target.name!r}. Remove it, or choose another path."
                    )
                os.replace(path, place)
            if replaced is not None and replaced.name not in [path.name for path in paths]:
                replaced.unlink()
                log.info("removed %s, the weights of the replaced model", replaced.name)


def _weights_beside(target: Path) -> Path | None:
    """The file with the weights of the model that lies at ``target``, as :func:`write` names it.

    None unless that model says so itself: another file of this name is not ours to remove.
    """
    weights = target.parent / data_name(target)
    if not weights.is_file() or not target.is_file():
        return None
    try:
        model = onnx.load(target, load_external_data=False)
    except Exception as error:
        log.debug("%s is not an ONNX model: %s", target, error)
        return None
    outside = filter(external_data_helper.uses_external_data, model.graph.initializer)
    places = {external_data_helper.ExternalDataInfo(tensor).location for tensor in outside}
    return weights if weights.name in places else None


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
            "holds less than 2 GiB. Pass external_data=None or True."
        )
    return True


def write(model: ir.Model, path: Path, *, external: bool) -> None:
    """Writes ``model``, with its weights beside it if ``external``.

    Raises:
        ExportError: the disk is full, or fails.
    """
    try:
        ir.save(model, path, external_data=data_name(path) if external else None)
    except OSError as error:
        raise ExportError(
            f"the model cannot be written to {path.parent.parent}: {error.strerror}. "
            "Free some space there, or choose another path."
        ) from error
