"""What the subcommands share: their error, and how the command line names a model."""

import importlib
import sys

from torch import nn

MODEL_HELP = "model, or function or class that returns it when called without arguments"


class CommandError(Exception):
    """A subcommand cannot do what it was asked to do; the message is one line.

    Attributes:
        code: exit code; 2 for what the user can correct on the command line.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def load_model(spec: str) -> nn.Module:
    """Returns the model that ``MODULE:FACTORY`` names, or makes when called without arguments.

    The current folder is searched for the module first, as with ``python -m``.

    Raises:
        CommandError: the text has another form, or the module, the factory or the model fails.
    """
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise CommandError(
            f"{spec!r} does not have the form MODULE:FACTORY, e.g. torchvision.models:resnet50"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module_name)
    except Exception as error:
        raise CommandError(f"cannot import {module_name}: {_one_line(error)}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise CommandError(f"{spec}: {module_name} has no {name!r}")
        found = getattr(found, name)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise CommandError(f"{spec} is not a function or class, but {type(found).__name__}")
    try:
        model = found()
    except Exception as error:
        raise CommandError(f"{spec} called without arguments: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{spec}() is not a torch.nn.Module, but {type(model).__name__}")
    return model


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
