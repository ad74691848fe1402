"""The op ``batch_norm_act``: ``batch_norm``, then the sum with a residual, then an activation.

Where it saves memory traffic all of it happens in the phases of the normalization, and the
activation's derivative in those of its backward; elsewhere it is what its parts are.
"""

import torch
from torch import Tensor

from bnrewrite import activations
from bnrewrite.ops.batch_norm import batch_norm, evaluate_site, unknown_to_torch
from bnrewrite.ops.epilogue import compose, joins_phases
from bnrewrite.ops.library import LIBRARY, define_composite, knows_only_torch
from bnrewrite.ops.sites import Site

LIBRARY.define(
    "batch_norm_act(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, "
    "bool track_running_stats, float? momentum, float eps, str group, Tensor? residual, "
    "str activation, float slope, bool skip_nonfinite=False, str into='new') -> Tensor"
)


def _batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    track_running_stats: bool,
    momentum: float | None,
    eps: float,
    group: str,
    residual: Tensor | None,
    activation: str,
    slope: float,
    skip_nonfinite: bool = False,
    into: str = "new",
) -> Tensor:
    """``act(batch_norm(input, ...) + residual)``.

    The first arguments and what is refused are those of ``batch_norm``. ``residual`` is broadcast
    and promoted as by torch's ``+``, or None; ``activation`` is one of
    :data:`bnrewrite.activations.ACTIVATIONS`; ``slope`` is that of ``leaky_relu``. With ``into`` as
    "own" the sum is ``+=``, which keeps the dtype and the shape.
    """
    if activation != "relu":
        activations.check_activation(activation)
    uses_batch = training or running_mean is None
    if not (uses_batch and joins_phases(input, residual, activation, group)):
        # Both are composites, so the function is the op, without a dispatch of its own.
        y = batch_norm(
            input, weight, bias, running_mean, running_var, num_batches_tracked, training,
            track_running_stats, momentum, eps, group, skip_nonfinite,
        )  # fmt: skip
        return compose(y, residual, activation, slope, into)
    site = Site(
        input, weight, bias, running_mean, running_var, num_batches_tracked, training,
        track_running_stats, momentum, eps, skip_nonfinite, residual, None, (activation, slope),
    )  # fmt: skip
    if knows_only_torch():
        raise unknown_to_torch(site.per_channel)
    return evaluate_site(site, group)


define_composite("batch_norm_act", _batch_norm_act)

BATCH_NORM_ACT = torch.ops.bnrewrite.batch_norm_act.default
