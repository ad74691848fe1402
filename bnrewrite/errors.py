"""The errors that bnrewrite raises about models and graphs.

Wrong arguments raise the built-in ``TypeError`` and ``ValueError``. The errors here are about what
a model contains or does. Their messages name the site, the value and the way out.
"""


class BnRewriteError(Exception):
    """Base class of every error that bnrewrite raises about a model."""


class UnsupportedBatchNorm(BnRewriteError, ValueError):  # noqa: N818
    """A BatchNorm site cannot be evaluated: wrong number of channels, wrong type, too few values.

    Attributes:
        tensors: the parameters and buffers of the site that were known where the error was raised.
            They identify the site in the model.
    """

    def __init__(self, message: str, tensors: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.tensors = tensors


class CaptureError(BnRewriteError):
    """A module could not be rewritten, and ``strict=True`` was set."""


class GroupError(BnRewriteError, RuntimeError):
    """The process group of a site does not exist, or this rank is not a member of it."""


class ScheduleError(BnRewriteError, RuntimeError):
    """The ranks of a group are about to run different collectives."""


class PeerError(BnRewriteError, RuntimeError):
    """Another rank of the group died, stalled or left, so a collective cannot complete."""


class BackwardError(BnRewriteError, RuntimeError):
    """What a backward pass needs of a site was freed by an earlier one, or written to."""


class ExportError(BnRewriteError, ValueError):
    """The model cannot be exported to ONNX, or the exported graph failed a check."""
