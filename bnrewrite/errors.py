"""The errors that bnrewrite raises about models and graphs.

Wrong arguments raise the built-in ``TypeError`` and ``ValueError``; everything here is about what a
model contains or does, and its message names the site, the value and the way out.
"""


class BnRewriteError(Exception):
    """Base of every error that bnrewrite raises about a model."""


class UnsupportedBatchNorm(BnRewriteError, ValueError):  # noqa: N818
    """A BatchNorm site cannot be evaluated: wrong channels, wrong type, too few values.

    Attributes:
        tensors: parameters and buffers of the site, as far as the raiser had them. Whoever knows
            the model finds the name of the site by them.
    """

    def __init__(self, message: str, tensors: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.tensors = tensors


class CaptureError(BnRewriteError):
    """``strict=True`` was asked for and a module could not be rewritten."""


class GroupError(BnRewriteError, RuntimeError):
    """The process group of a site does not exist, or this rank is not a member of it."""


class ScheduleError(BnRewriteError, RuntimeError):
    """Ranks of a group are about to communicate different things."""


class PeerError(BnRewriteError, RuntimeError):
    """Another rank of the group died, stalled or left, so a collective cannot be completed."""


class BackwardError(BnRewriteError, RuntimeError):
    """A backward comes to sites that share a collective, and an earlier one has freed them."""


class ExportError(BnRewriteError, ValueError):
    """The model cannot be exported to ONNX, or the exported graph failed a check."""
