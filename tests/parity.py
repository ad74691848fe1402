"""Comparison of a converted model with the same model unconverted."""

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import bnrewrite

_TRAINING_FLAG = {
    torch.ops.aten.native_batch_norm.default: 5,
    torch.ops.aten._native_batch_norm_legit.default: 5,
    torch.ops.aten._native_batch_norm_legit.no_stats: 3,
    torch.ops.aten.cudnn_batch_norm.default: 5,
}


_OURS = (torch.ops.bnrewrite.moments.default, torch.ops.bnrewrite.batch_norm_local.default)
"""One of the two runs in each evaluation with batch statistics, whoever shares them."""


class CountEvaluations(TorchDispatchMode):
    """Counts BatchNorm evaluations with batch statistics: torch's own and ours."""

    def __init__(self) -> None:
        super().__init__()
        self.num_torch = 0
        self.num_ours = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _TRAINING_FLAG:
            self.num_torch += bool(args[_TRAINING_FLAG[func]])
        self.num_ours += func in _OURS
        return func(*args, **(kwargs or {}))


def seed(value: int) -> None:
    """Seeds every generator that a forward may draw from."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def run_step(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, backward: bool
) -> tuple[list[Tensor], list[Tensor | None], CountEvaluations]:
    """Outputs, gradients of all parameters and counts of one forward and backward."""
    model.zero_grad()
    with CountEvaluations() as counts:
        outputs = [out for out in tensors(model(*args, **kwargs)) if out.is_floating_point()]
        if backward:
            # A plain sum of BatchNorm outputs or of their squares is constant: no gradient.
            weights = [torch.sin(torch.arange(out.numel()).to(out)) for out in outputs]
            losses = [
                (out.flatten() * weight).sum()
                for out, weight in zip(outputs, weights, strict=True)
                if out.requires_grad
            ]
            torch.stack(losses).sum().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [out.detach() for out in outputs], grads, counts


def to_double(value: Any) -> Any:
    """float64 copies of the floating-point tensors in nested containers."""
    return tree_map(
        lambda leaf: (
            leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        ),
        value,
    )


def assert_same_training(
    make: Callable[[], nn.Module],
    arguments: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]],
    *,
    num_other: int = 0,
    convert: Callable[[nn.Module], nn.Module] = bnrewrite.convert,
    rtol: float = 1e-9,
    double: bool = True,
    rate: float = 0.05,
) -> nn.Module:
    """Three training steps and an evaluation agree with the unconverted model.

    Unless told otherwise in float64, where the two sum in different orders, which costs some
    rounding errors (1e-16) per layer, amplified by rstd on the way. ``rtol`` is relative to the
    largest entry of all tensors of a kind, since a bias in front of a BatchNorm has a gradient of
    nothing but rounding errors. ``rate`` is the learning rate: with too large a one deep models
    end in NaN, which never passes for equal.
    """
    cast = to_double if double else lambda value: value
    seed(0)
    plain = make()
    seed(0)
    converted = make()
    if double:
        plain, converted = plain.double(), converted.double()
    converted = convert(converted)
    assert [*plain.state_dict()] == [*converted.state_dict()]
    for step in range(3):
        results = []
        for model in (plain, converted):
            model.train()
            seed(step)
            args, kwargs = cast(arguments(2 + step))
            results.append(run_step(model, args, kwargs, backward=True))
        (outs, grads, counts), (our_outs, our_grads, our_counts) = results
        _assert_close(our_outs, outs, rtol, f"output, step {step}")
        _assert_close(our_grads, grads, rtol, f"gradient, step {step}")
        _assert_close([*converted.buffers()], [*plain.buffers()], rtol, f"buffer after step {step}")
        assert counts.num_ours == 0
        assert our_counts.num_torch == num_other, "a BatchNorm evaluation escaped"
        assert our_counts.num_ours + num_other == counts.num_torch
        for model in (plain, converted):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= rate * parameter.grad
        # Both go on from the same state: a rounding error may flip a ReLU in the next step.
        converted.load_state_dict(copy.deepcopy(plain.state_dict()))
    results = []
    for model in (plain, converted):
        model.eval()
        seed(9)
        args, kwargs = cast(arguments(3))
        with torch.no_grad():
            results.append(run_step(model, args, kwargs, backward=False))
    (outs, _, _), (our_outs, _, our_counts) = results
    assert our_counts.num_ours <= sum(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        for module in converted.modules()
    )
    for ours, theirs in zip(our_outs, outs, strict=True):
        assert torch.equal(ours, theirs), "evaluation is not bit-equal"
    return converted


def _assert_close(
    ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], rtol: float, what: str
) -> None:
    assert len(ours) == len(theirs)
    largest = [b.abs().max().item() for b in theirs if b is not None and b.numel()]
    scale = max(largest, default=0.0)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), f"{what} {index}: only one of them exists"
        if a is None or b is None:
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        error = (a - b).abs().max().item() if b.numel() else 0.0
        assert error <= rtol * scale, f"{what} {index}: {error:.2e}, scale {scale:.2e}"
