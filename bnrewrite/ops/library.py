"""Registration of ops: one library, one way to define a phase."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnrewrite.guards import is_compiling, runs_in_python
from bnrewrite.watch import runs_unseen

LIBRARY = torch.library.Library("bnrewrite", "DEF")


_COMPOSITES: dict[int, Callable[..., Any]] = {}
"""The function of each composite of one input, by the id of the op, whose own hash takes long."""


def define_composite(name: str, function: Callable[..., Any]) -> None:
    """Registers an op that is made of others, of which ``torch.func.vmap`` sees these, too."""
    runs_in_python(function)
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    LIBRARY.impl(name, function, "FuncTorchBatched")
    op = getattr(torch.ops.bnrewrite, name).default
    if isinstance(op._schema.arguments[0].type, torch.TensorType):
        _COMPOSITES[id(op)] = function


def argument(call: torch.fx.Node, name: str) -> Any:
    """What a call of one of our ops in a graph gives for an argument of the op's schema."""
    op: Any = call.target
    places = _PLACES.get(id(op))
    if places is None:
        places = {one.name: (at, one) for at, one in enumerate(op._schema.arguments)}
        _PLACES[id(op)] = places
    at, declared = places[name]
    return call.args[at] if at < len(call.args) else declared.default_value


_PLACES: dict[int, dict[str, tuple[int, Any]]] = {}
"""Places of arguments, by the id of the op, whose own hash takes long."""


below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context in which ops run without their autograd kernels, as inside ``autograd.Function``."""

_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality

_PLAIN = frozenset((Tensor, torch.nn.Parameter, float, int, bool, str, type(None)))
"""Types of arguments that no dispatch changes."""

KERNELS: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""The CPU and the CUDA kernel of each phase, by the id of the op, whose own hash takes long."""


def run(phase: torch._ops.OpOverload, x: Tensor, *args: Any) -> Any:
    """``phase(x, *args)``.

    A dispatch takes as long as a kernel does for some ten thousand values. So below autograd, where
    no mode, transform or profiler looks at ops and no argument is a subclass that would, the kernel
    is called itself.
    """
    kernels = KERNELS.get(id(phase))
    if (
        kernels is not None
        and torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
        and _needs_no_dispatch(x, args)
    ):
        cpu, cuda = kernels
        return cpu(x, *args) if x.is_cpu else cuda(x, *args)
    return phase(x, *args)


def run_composite(composite: torch._ops.OpOverload, x: Tensor, *args: Any) -> Any:
    """``composite(x, *args)``, as its function where a dispatch would do no more than call it."""
    if (
        not is_compiling()
        and torch._C._len_torch_function_stack() == 0
        and _needs_no_dispatch(x, args)
    ):
        return _COMPOSITES[id(composite)](x, *args)
    return composite(x, *args)


def knows_only_torch() -> bool:
    """Whether a transform of ``torch.func`` is under way.

    They refuse autograd functions whose gradients have gradients, and know torch's BatchNorm.
    """
    stack = torch._C._functorch.peek_interpreter_stack()
    return stack is not None and stack.key() in _TRANSFORMS


_TRANSFORMS = tuple(
    getattr(torch._C._functorch.TransformType, name) for name in ("Grad", "Jvp", "Vmap")
)


def is_traced_by_jit() -> bool:
    """Whether ``torch.jit.trace`` records what runs."""
    return torch._C._get_tracing_state() is not None


def is_composite(target: Any) -> bool:
    """Whether ``target`` is an op that :func:`run_composite` can call."""
    return id(target) in _COMPOSITES


def _needs_no_dispatch(x: Tensor, args: tuple[Any, ...]) -> bool:
    return (
        runs_unseen(x)
        and _PLAIN.issuperset(map(type, args))
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
    )


def define_phase(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    definition: Callable[..., Any],
    fallback: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Registers a phase: a local op with one kernel per device.

    Args:
        schema: name, arguments and results, as ``torch.library`` wants them.
        cpu: kernel for CPU tensors.
        cuda: kernel for CUDA tensors.
        fake: shapes, dtypes and strides of the results.
        definition: the op in differentiable torch, with the same arguments and without side
            effects. Its derivatives, of any order, are those of the op.
        fallback: kernel for every other device; the definition, unless the op has side effects.

    Returns:
        The op.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    LIBRARY.impl(name, fallback or definition, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bnrewrite::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.bnrewrite, name).default
    LIBRARY.impl(name, _autograd_kernel(op, definition), "Autograd")
    KERNELS[id(op)] = cpu, cuda
    return op


def _autograd_kernel(op: torch._ops.OpOverload, definition: Callable[..., Any]) -> Callable:
    class Phase(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.is_tensor = [isinstance(arg, Tensor) for arg in args]
            ctx.constants = [None if isinstance(arg, Tensor) else arg for arg in args]
            ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
            with below_autograd():
                return run(op, *args)

        @staticmethod
        @runs_in_python
        def backward(ctx, *grads):
            create_graph = torch.is_grad_enabled()
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            saved = iter(ctx.saved_tensors)
            with torch.enable_grad():
                # Views, because one argument may depend on another: the derivatives are partial.
                args = [
                    next(saved)[...] if is_tensor else constant
                    for is_tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
                ]
                results = definition(*args)
                results = results if isinstance(results, tuple) else (results,)
                # A result may be empty for these arguments.
                pairs = [
                    (result, grad)
                    for result, grad in zip(results, grads, strict=True)
                    if result.requires_grad
                ]
                found = torch.autograd.grad(
                    [result for result, _ in pairs],
                    [args[i] for i in wanted],
                    [grad for _, grad in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                )
            by_index = dict(zip(wanted, found, strict=True))
            return tuple(by_index.get(i) for i in range(len(args)))

    def kernel(*args):
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            return Phase.apply(*args)
        with below_autograd():
            return run(op, *args)

    return kernel
