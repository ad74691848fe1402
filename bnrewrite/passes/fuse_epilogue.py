"""The pass ``fuse_epilogue``: a BatchNorm takes the sum and the activation that follow it.

    y = batch_norm(x, ...)
    z = y + shortcut               ->      z = batch_norm_act(x, ..., shortcut, "relu")
    z = relu(z)

On GPUs the forward then reads ``x`` and the shortcut and writes ``z``, which saves five passes over
memory. Nodes are fused only if nothing else reads the values in between and if moving the nodes
together changes nothing else.
"""

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from bnrewrite.ops.batch_norm import BATCH_NORM
from bnrewrite.ops.batch_norm_act import BATCH_NORM_ACT
from bnrewrite.ops.shared_batch_norm import FINISH_BATCH_NORM
from bnrewrite.ops.shuffle_batch_norm import SHUFFLE_BATCH_NORM
from bnrewrite.passes.base import OwnerGraph, PassReport, Rewrite
from bnrewrite.passes.effects import Order
from bnrewrite.passes.epilogues import (
    Activation,
    activation_of,
    is_addition,
    is_identity,
    writes_into,
)
from bnrewrite.passes.nodes import call_function
from bnrewrite.passes.torch_calls import Does, function_does
from bnrewrite.sites.classes import original_class
from bnrewrite.sites.floor import has_hooks


@dataclasses.dataclass
class _Chain:
    """A BatchNorm and the nodes behind it that become one with it, in order."""

    nodes: list[fx.Node]
    residual: fx.Node | None = None
    activation: Activation | None = None
    into: str = "new"
    reason: str = ""

    @property
    def gains(self) -> bool:
        """Whether it contains more than modules that do nothing."""
        return self.residual is not None or self.activation is not None


class _Before:
    """What must run before a node: by the order of the graph before the pass, made when needed."""

    def __init__(self, target: OwnerGraph) -> None:
        self._target = target
        self._order: Order | None = None
        self._became: dict[fx.Node, fx.Node] = {}

    def __call__(self, node: fx.Node) -> set[fx.Node]:
        if self._order is None:
            self._order = Order(self._target.owner, self._target.graph)
            self._target.flags.update(self._order.flags)
        return {self._became.get(one, one) for one in self._order.before[node]}

    def became(self, nodes: list[fx.Node], new: fx.Node) -> None:
        """Notes that ``new`` stands for ``nodes`` now."""
        if self._order is not None:
            befores = [self._order.before[node] for node in nodes]
            self._order.before[new] = set().union(*befores)
        self._became.update(dict.fromkeys(nodes, new))


def fuse_epilogue(target: OwnerGraph, report: PassReport) -> None:
    """Fuses what follows the sites of one owner's training graph."""
    if not target.training:
        return
    before = _Before(target)
    for node in target.graph.find_nodes(op="call_function", target=FINISH_BATCH_NORM):
        _fuse_shared(target, node, report, before)
    for node in target.graph.find_nodes(op="call_function", target=SHUFFLE_BATCH_NORM):
        if any(_follows(target, user) for user in node.users):
            site = node.meta["site"]
            reason = "its statistics come from another rank"
            report.skipped.append(target.skip(site.name, reason, node, site.path))
    for node in target.graph.find_nodes(op="call_function", target=BATCH_NORM):
        chain = _chain(target, node)
        if chain is None:
            continue
        site: Rewrite = node.meta["site"]
        if chain.gains and not _in_one_piece(chain):
            _shorten_to_movable(target, chain, before)
        if chain.reason:
            report.skipped.append(target.skip(site.name, chain.reason, node, site.path))
        if chain.gains:
            before.became(chain.nodes, _fuse(target, chain))
            report.rewritten.append(site)


def _fuse_shared(target: OwnerGraph, finish: fx.Node, report: PassReport, before: _Before) -> None:
    """Fuses what follows the sites that end a collective together, at the place of that end.

    The last one first: where the results of two sites are added, the later site takes the sum.
    """
    sites: list[Rewrite] = finish.args[0].meta["sites"]  # pyright: ignore
    results = {node.args[1]: node for node in finish.users}
    for index in sorted(results, reverse=True):  # pyright: ignore[reportCallIssue, reportArgumentType]
        chain = _chain(target, results[index])
        if chain is None:
            continue
        if chain.residual is not None:
            _shorten_to_early(target, chain, finish, before)
        site = sites[index]  # pyright: ignore[reportCallIssue, reportArgumentType]
        if chain.reason:
            report.skipped.append(target.skip(site.name, chain.reason, chain.nodes[0], site.path))
        if chain.gains:
            before.became(chain.nodes[1:], chain.nodes[0])
            _fuse_into(target, chain, finish, index)
            report.rewritten.append(site)


def _shorten_to_early(target: OwnerGraph, chain: _Chain, finish: fx.Node, before: _Before) -> None:
    """Cuts the chain where its nodes could not run as soon as ``finish`` has ended.

    An activation of a result that nobody else reads always can; a sum needs its other operand.
    """
    early = {finish, *finish.users}
    for node in target.graph.nodes:
        if node is finish:
            break
        early.add(node)
    added = _result_of(finish, chain.residual)
    for index, node in enumerate(chain.nodes[1:], start=1):
        if added is not None and is_addition(node) and not _may_be_added(added, chain):
            chain.reason = "it is added to another site's result, which is also used elsewhere"
        elif not before(node) <= early:
            chain.reason = "its other inputs are not ready when its collective ends"
        else:
            early.add(node)
            continue
        while len(chain.nodes) > index:
            _cut(target, chain)
        return


def _result_of(finish: fx.Node, node: fx.Node | None) -> fx.Node | None:
    """``node`` if it is the result of a site of ``finish``."""
    return node if node is not None and node in finish.users else None


def _may_be_added(added: fx.Node, chain: _Chain) -> bool:
    """Whether nobody else reads the result of a site, and it is there before that of the chain."""
    own, its = (int(node.args[1]) for node in (chain.nodes[0], added))  # pyright: ignore
    return len(added.users) == 1 and its < own


def _cut(target: OwnerGraph, chain: _Chain) -> None:
    """Takes the last node off the chain, and what does nothing before it."""
    cut = chain.nodes.pop()
    if chain.activation is not None and activation_of(target.owner, cut) is not None:
        chain.activation = None
    elif is_addition(cut):
        chain.residual = None
        chain.into = "new"
    _drop_identities(chain)


def _fuse_into(target: OwnerGraph, chain: _Chain, finish: fx.Node, index: Any) -> None:
    """Gives site ``index`` of ``finish`` what follows it."""
    _note_assumptions(target, chain)
    *others, residual, residual_site, activation, slope, into = map(list, finish.args[1:])  # pyright: ignore
    added = _result_of(finish, chain.residual)
    if added is None:
        residual[index] = chain.residual
    else:
        residual_site[index] = added.args[1]
    act = chain.activation or Activation("identity")
    activation[index], slope[index], into[index] = act.name, act.slope, chain.into
    epilogue = (residual, residual_site, activation, slope, into)
    finish.args = (finish.args[0], *others, *epilogue)
    chain.nodes[-1].replace_all_uses_with(chain.nodes[0])
    for node in reversed(chain.nodes[1:]):
        target.graph.erase_node(node)
    if added is not None:
        target.graph.erase_node(added)


def _follows(target: OwnerGraph, user: fx.Node) -> bool:
    return is_addition(user) or activation_of(target.owner, user) is not None


def _chain(target: OwnerGraph, site: fx.Node) -> _Chain | None:
    """What can be fused behind ``site``; None where nothing is near."""
    chain = _Chain([site])
    while chain.activation is None and not chain.reason:
        last = chain.nodes[-1]
        users = list(last.users)
        if len(users) != 1:
            near = any(_follows(target, user) for user in users)
            chain.reason = "its result is used in several places" if near else ""
            break
        user = users[0]
        if not (_extend_by_sum(chain, last, user) or _extend_by_call(target, chain, user)):
            break
    _drop_identities(chain)
    return chain if chain.gains or chain.reason else None


def _extend_by_sum(chain: _Chain, last: fx.Node, user: fx.Node) -> bool:
    """Takes an addition into the chain, or notes why not; whether ``user`` is one."""
    if not is_addition(user) or chain.residual is not None:
        return False
    residual: Any = user.args[1] if user.args[0] is last else user.args[0]
    written = writes_into(user)
    if written not in (None, last) and not _ends_with(last, written):
        chain.reason = "it is added in place to another value"
    elif not _is_tensor(residual):
        chain.reason = "what is added to it may not be a tensor"
    else:
        chain.residual = residual
        chain.into = "new" if written is None else "own" if written is last else "other"
        chain.nodes.append(user)
    return True


def _ends_with(result: fx.Node, other: fx.Node | None) -> bool:
    """Whether both are results of one collective, of which nobody else reads ``other``."""
    return (
        other is not None
        and result.target is other.target is operator.getitem
        and result.args[0] is other.args[0]
        and len(other.users) == 1
    )


def _extend_by_call(target: OwnerGraph, chain: _Chain, user: fx.Node) -> bool:
    """Takes an activation or an identity into the chain, or notes why not; whether it is one."""
    activation = activation_of(target.owner, user)
    kept = "" if user.op != "call_module" else _kept(target, str(user.target))
    if activation is None:
        if kept or not is_identity(target.owner, user):
            return False
    elif kept:
        chain.reason = kept
        return True
    chain.activation = activation
    chain.nodes.append(user)
    return True


def _kept(target: OwnerGraph, path: str) -> str:
    """Why the module at ``path`` must stay a call; "" if it need not."""
    if target.keeps(path):
        return "what follows it is listed in keep"
    if has_hooks(target.owner.get_submodule(path)):
        return "what follows it has hooks, which only a call would run"
    return ""


def _is_tensor(node: fx.Node) -> bool:
    """Whether ``node`` makes a tensor; an argument is checked when it comes.

    Of a number that a child gives the code of the graph makes one.
    """
    if node.op in ("placeholder", "call_module"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        returns = [str(one.type) for one in node.target._schema.returns]
        return returns == ["Tensor"]
    if node.op == "get_attr":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and node.args[0].target is FINISH_BATCH_NORM
    does = function_does(node)
    if node.op == "call_method":
        # What has such a method is a tensor.
        return Does.TENSOR in does or Does.ARITHMETIC in does
    if Does.ARITHMETIC in does:
        return any(_is_tensor(source) for source in node.all_input_nodes)
    home = str(getattr(node.target, "__module__", ""))
    return home == "torch.nn.functional" or (Does.TENSOR in does and home.startswith("torch"))


def _drop_identities(chain: _Chain) -> None:
    """Leaves out modules that do nothing at the end of the chain."""
    while len(chain.nodes) > 1 and chain.nodes[-1].op == "call_module":
        if chain.activation is not None:
            return
        chain.nodes.pop()


def _in_one_piece(chain: _Chain) -> bool:
    """Whether nothing runs between the nodes of the chain."""
    return all(one.next is two for one, two in zip(chain.nodes, chain.nodes[1:], strict=False))


def _shorten_to_movable(target: OwnerGraph, chain: _Chain, before: _Before) -> None:
    """Cuts the chain where its nodes could not run together at the place of the last one."""
    nodes = list(target.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    while len(chain.nodes) > 1:
        first, last = position[chain.nodes[0]], position[chain.nodes[-1]]
        moved = set(chain.nodes)
        between = [node for node in nodes[first:last] if node not in moved]
        if not any(moved & before(node) for node in between):
            return
        chain.reason = "other operations must run between it and what follows it"
        _cut(target, chain)


def _fuse(target: OwnerGraph, chain: _Chain) -> fx.Node:
    """Puts one node in place of the chain, where its last node is; returns it."""
    _note_assumptions(target, chain)
    site, last = chain.nodes[0], chain.nodes[-1]
    activation = chain.activation or Activation("identity")
    *arguments, skip_nonfinite = site.args
    epilogue = (chain.residual, activation.name, activation.slope)
    with target.graph.inserting_before(last):
        arguments += (*epilogue, skip_nonfinite, chain.into)
        new = call_function(target.graph, BATCH_NORM_ACT, tuple(arguments))
    new.meta.update(site.meta)
    last.replace_all_uses_with(new)
    for node in reversed(chain.nodes):
        target.graph.erase_node(node)
    return new


def _note_assumptions(target: OwnerGraph, chain: _Chain) -> None:
    """Notes what must hold so that one node can stand for the nodes of the chain."""
    if chain.residual is not None and chain.residual.op == "placeholder":
        target.tensors.add(chain.residual.name)
    for node in chain.nodes[1:]:
        if node.op == "call_module":
            path = str(node.target)
            module = target.owner.get_submodule(path)
            target.absorbed[path] = original_class(module)
            if chain.activation is not None and activation_of(target.owner, node) is not None:
                for name in chain.activation.flags:
                    target.flags[path, name] = getattr(module, name)
