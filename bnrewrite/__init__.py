"""Distributed BatchNorm for PyTorch by rewriting graphs.

``convert`` makes the BatchNorm of a model distributed, ``report`` says what was rewritten,
``revert`` undoes it, ``check`` compares the ranks, ``graphs`` shows the rewritten graphs,
``export_onnx`` writes the eval graph.
"""

from bnrewrite.check import check
from bnrewrite.convert import convert, graphs, revert
from bnrewrite.errors import (
    BackwardError,
    BnRewriteError,
    CaptureError,
    ExportError,
    GroupError,
    PeerError,
    ScheduleError,
    UnsupportedBatchNorm,
)
from bnrewrite.export.api import export_onnx
from bnrewrite.export.report import ExportReport
from bnrewrite.modes import Frozen, Local, Shuffle, Sync
from bnrewrite.report import Report, report
from bnrewrite.shuffle_batch import shuffle_batch

__version__ = "0.1.0"

__all__ = [
    "BackwardError",
    "BnRewriteError",
    "CaptureError",
    "ExportError",
    "ExportReport",
    "Frozen",
    "GroupError",
    "Local",
    "PeerError",
    "Report",
    "ScheduleError",
    "Shuffle",
    "Sync",
    "UnsupportedBatchNorm",
    "check",
    "convert",
    "export_onnx",
    "graphs",
    "report",
    "revert",
    "shuffle_batch",
]
