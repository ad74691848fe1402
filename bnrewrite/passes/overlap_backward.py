"""The pass ``overlap_backward``: computes weight gradients during the collectives of backward.

    z = conv(y)                    ->       z = convolve(conv, y, group)

In backward, the collective of a site is launched once the input gradient of the next convolution is
ready. Nothing needs the weight gradient of that convolution before the optimizer, so it is computed
while the collective is in flight. Eager mode on the CPU and CUDA graphs use this schedule; compiled
graphs get theirs from :mod:`bnrewrite.compiler`. All gradients are bit-identical.
"""

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from bnrewrite.groups import NO_GROUP, active_group
from bnrewrite.guards import is_compiling
from bnrewrite.ops.convolution import Geometry, convolution
from bnrewrite.ops.library import argument, is_traced_by_jit, knows_only_torch
from bnrewrite.ops.shared_batch_norm import START_BATCH_NORM
from bnrewrite.ops.slot import hides_collectives
from bnrewrite.passes.base import Attribute, OwnerGraph, PassReport, Rewrite, where
from bnrewrite.passes.effects import is_known_leaf
from bnrewrite.passes.nodes import call_function
from bnrewrite.passes.rounds import communication
from bnrewrite.passes.torch_calls import Does, function_does, layer_does
from bnrewrite.sites.classes import below
from bnrewrite.sites.floor import has_hooks

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def overlap_backward(target: OwnerGraph, report: PassReport) -> None:
    """Gives the convolutions beside the sites of one training graph gradients in two parts."""
    group = _group(target.graph)
    if not target.training or group is None:
        return
    for node in list(target.graph.nodes):
        conv = target.owner.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(conv) not in _CONVOLUTIONS or len(node.args) != 1 or node.kwargs:
            continue
        if not _comes_from_site(target, node):
            continue
        path = str(node.target)
        name = target.qualified(path)
        if not _has_plain_padding(conv):
            reason = "its padding is not plain zero padding"
            report.skipped.append(target.skip(name, reason, node, path))
            continue
        with target.graph.inserting_before(node):
            site_group = call_function(target.graph, active_group, group)
            arguments = (Attribute(path), node.args[0], site_group)
            new = call_function(target.graph, convolve, arguments)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        target.graph.erase_node(node)
        report.rewritten.append(Rewrite(name, target.name, path, None, where(new)))


def _comes_from_site(target: OwnerGraph, conv: fx.Node) -> bool:
    """Whether a site, of this graph or before it, is what the input gradient of ``conv`` goes to.

    Behind another convolution the weight gradient would wait, with all that it needs, although
    there is other work to hide the collective.
    """
    todo, seen = list(conv.all_input_nodes), set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" or getattr(node.target, "namespace", "") == "bnrewrite":
            return True
        if node.op == "call_module":
            module = target.owner.get_submodule(str(node.target))
            if not is_known_leaf(module):
                # Whatever it is, it has work of its own or sites.
                return True
            if Does.HEAVY in layer_does(type(module)):
                continue
        if node.target is not convolve and Does.HEAVY not in function_does(node):
            todo.extend(node.all_input_nodes)
    return False


def _group(graph: fx.Graph) -> tuple[Any, ...] | None:
    """How a site of ``graph`` itself finds its group; None if no backward here has a collective.

    Arguments of ``active_group``: attributes of the owner and constants, known at every place.
    """
    for node in graph.nodes:
        if communication(node).backward > 0:
            groups = argument(node, "group")
            group = groups[0] if node.target is START_BATCH_NORM else groups
            args = [
                Attribute(str(arg.target))
                if isinstance(arg, fx.Node) and arg.op == "get_attr"
                else arg
                for arg in group.args
            ]
            if not any(isinstance(arg, fx.Node) for arg in args):
                return tuple(args)
    return None


def _has_plain_padding(conv: Any) -> bool:
    return conv.padding_mode == "zeros" and isinstance(conv.padding, tuple)


def convolve(conv: Any, x: Tensor, group: str) -> Tensor:
    """``conv(x)``, with a weight gradient that can wait where one is wanted in eager mode.

    What ranks do must not depend on hooks, which one of them may have and the others not: with
    gradients in another order, collectives of other owners would meet those of the sites.

    Args:
        conv: one of torch's convolutions.
        x: its input.
        group: name of the group with which the sites beside it communicate now, or "".
    """
    if (
        group == NO_GROUP
        or is_compiling()
        or not hides_collectives(x)
        or "forward" in conv.__dict__
    ):
        return conv(x)
    if not has_hooks(conv):
        return _forward(conv, x)
    conv.__dict__["forward"] = functools.partial(_forward, conv)
    try:
        return conv(x)
    finally:
        del conv.__dict__["forward"]


@contextlib.contextmanager
def waiting_convolutions(owner: nn.Module, graph: fx.Graph) -> Iterator[None]:
    """While the own forward of ``owner`` runs, its convolutions are those of ``graph``."""
    convs = []
    for node in graph.find_nodes(op="call_function", target=convolve):
        name, training = node.args[2].args  # pyright: ignore
        try:
            if isinstance(training, Attribute):
                training = operator.attrgetter(training.path)(owner)
            conv: Any = below(owner, node.args[0].path)  # pyright: ignore
        except AttributeError:
            # Removed since the graph was captured.
            continue
        if type(conv) not in _CONVOLUTIONS or "forward" in conv.__dict__:
            continue
        if active_group(str(name), bool(training)) != NO_GROUP:
            conv.__dict__["forward"] = functools.partial(_forward, conv)
            convs.append(conv)
    try:
        yield
    finally:
        for conv in convs:
            del conv.__dict__["forward"]


def _forward(conv: Any, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs or len(args) != 1 or not _can_wait(conv, args[0]):
        return type(conv).forward(conv, *args, **kwargs)
    x = _cast(args[0])
    weight = _cast(conv.weight)
    bias = None if conv.bias is None else _cast(conv.bias)
    transposed = isinstance(conv, _ConvTransposeNd)
    geometry = Geometry(
        conv.stride, conv.padding, conv.dilation, transposed, conv.output_padding, conv.groups
    )
    return convolution(x, weight, bias, geometry)


def _cast(tensor: Tensor) -> Tensor:
    """``tensor`` as autocast gives it to a convolution; gradients need what that has seen."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _can_wait(conv: Any, x: Tensor) -> bool:
    """Whether both gradients of ``conv(x)`` are wanted, and that of the weight may come later.

    FSDP2 and ZeRO-3 take the gradients of a module for complete when that of its input is.
    """
    weight = conv._parameters.get("weight")
    return (
        not is_compiling()
        and hides_collectives(x)
        and not x.is_meta
        and not is_traced_by_jit()
        and not knows_only_torch()
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and x.requires_grad
        and type(weight) in (Tensor, nn.Parameter)
        and weight.requires_grad
        and "ds_id" not in vars(weight)
        and type(conv) in _CONVOLUTIONS
        and not conv.__dict__.get("_is_fsdp_managed_module")
        and x.dim() == weight.dim()
        and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        and _has_plain_padding(conv)
    )
