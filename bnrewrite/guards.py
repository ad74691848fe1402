"""What Python does while Dynamo traces or listens: answers that a graph relies on, and errors."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from bnrewrite.errors import BnRewriteError

T = TypeVar("T", bound="str | bool | tuple[int, ...]")

F = TypeVar("F", bound=Callable[..., Any])

_GUARDED = "_bnrewrite_answers"


def runs_in_python(function: F) -> F:
    """``function`` itself, of which Dynamo does not compile a frame, nor those of its calls.

    For what autograd and the dispatcher call. They do so within a compiled function, too, after a
    graph break: frame by frame some would be compiled and others not, and to functions that leave
    something for each other it must be the same. What Dynamo inlines, it traces all the same.
    """
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
    return function


@runs_in_python
def _is_compiling() -> bool:
    tracing: Any = getattr(torch._guards._TLS, "tracing_context", None)
    return tracing is not None or torch.compiler.is_compiling()


# In a frame of its own Dynamo would answer yes, hence runs_in_python.
is_compiling: Callable[[], bool] = (
    torch.compiler.is_compiling
    if hasattr(torch.compiler, "_compile_session_context")
    else _is_compiling
)
"""Whether a compiler or an exporter traces what runs.

Up to torch 2.12, torch denies it while AOTAutograd traces what Dynamo found.
"""


def is_fake(values: Any) -> bool:
    """Whether what is computed of ``values`` has shapes only."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None or any(
        isinstance(leaf, torch.Tensor) and (leaf.is_meta or isinstance(leaf, FakeTensor))
        for leaf in tree_leaves(values)
    )


def is_ordered_by_compiler() -> bool:
    """Whether a compiler makes a graph of what runs, which it orders by itself.

    In compiled autograd the functions of one backward may be traced, or run after a graph break.
    """
    # Who has not imported it has not entered it.
    compiled_autograd: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    return is_compiling() or (
        compiled_autograd is not None and compiled_autograd.in_compiled_autograd_region
    )


def guard_answer(what: str, ask: Callable[..., T], *args: Any) -> T:
    """What ``ask(*args)`` answers; the graph that Dynamo is tracing serves while it does.

    Called while Dynamo traces, by a function that it takes for constant.

    Args:
        what: tells the question from others; with ``args``, which are hashable.
        ask: raises whatever makes the graph useless.
        args: of ``ask``.
    """
    with errors_pass_through_dynamo():
        answer = ask(*args)
    output = graph_in_the_making()
    if output is None or (what, args) in vars(output).setdefault(_GUARDED, set()):
        return answer
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import CallFunctionNoArgsSource, GlobalSource

    def ask_again() -> T | str:
        try:
            return ask(*args)
        except Exception as error:
            # The graph is left, and the one who traces again meets the error.
            return f"{type(error).__name__}, no answer"

    name = output.install_global("bnrewrite_asks", ask_again)
    source = CallFunctionNoArgsSource(GlobalSource(name))
    install_guard(source.make_guard(GuardBuilder.CONSTANT_MATCH))
    vars(output)[_GUARDED].add((what, args))
    return answer


def graph_in_the_making() -> Any:
    """What Dynamo keeps of the graph that it is tracing; None if it traces none."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output
    except AttributeError:
        # torch.export traces without Dynamo, once.
        return None


@torch.compiler.assume_constant_result
def is_in_higher_order_op() -> bool:
    """Whether Dynamo traces what becomes a graph inside its graph, as for a checkpoint."""
    output = graph_in_the_making()
    return output is not None and output.current_tracer.parent is not None


@contextlib.contextmanager
def errors_pass_through_dynamo() -> Iterator[None]:
    """Raises our errors so that Dynamo hands them on as they are, instead of calling them internal.

    For what Dynamo takes for constant.
    """
    try:
        yield
    except BnRewriteError as error:
        raise _passing(type(error))(str(error)) from error


@functools.cache
def _passing(kind: type[BnRewriteError]) -> type[BnRewriteError]:
    from torch._dynamo.exc import TorchRuntimeError

    return type(kind.__name__, (kind, TorchRuntimeError), {"__module__": kind.__module__})
