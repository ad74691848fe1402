"""Distributed BatchNorm for PyTorch, by graph rewriting.

``convert`` makes the BatchNorm layers of a model distributed, ``report`` says what it rewrote,
``revert`` undoes it, ``check`` compares the ranks, ``graphs`` returns the rewritten graphs,
``export_onnx`` writes the eval graph, and ``shuffle_batch`` permutes samples across ranks.
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
