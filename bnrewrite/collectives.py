"""What sites send each other in training: the only file that names collectives.

:mod:`bnrewrite.watch` launches the collectives that no compiler sees and waits for them. All other
communication is not about statistics: :mod:`bnrewrite.agreement` compares ranks and passes on
buffers after a load, through the group's store, and :mod:`bnrewrite.sites.ddp_join` runs the
communication hook of a DDP instance for a rank that has no batches left.

Collectives are torch's functional collectives, so a compiled graph shows each of them. They are
created in program order, which is the same on every rank.

Statistics are summed by an all-reduce. If messages cost more than their content, as with gloo on
the CPU, an all-gather takes its place, whose ring needs half as many steps; every rank then adds in
the same order. All ranks make the same choice, from the group and the number of values.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnrewrite.groups import NO_GROUP, find_group, group_of, name_in, parts_of, place_in
from bnrewrite.guards import is_compiling, runs_in_python
from bnrewrite.watch import finish, is_watched, launch, peer_error, runs_unseen


def all_reduce_sum(
    packed: Tensor, group: str, site: tuple[Any, ...] = (), *, is_last_use: bool = False
) -> Tensor:
    """Sum of ``packed`` over the ranks of ``group``: the same bits on every rank.

    By an all-reduce, or an all-gather whose parts every rank adds: see the top of this file.

    Args:
        packed: (K,), float64, of the same size on every rank.
        group: from :func:`active_group`; ``NO_GROUP`` returns ``packed`` itself.
        site: tensors of the sites, by which an error finds their names.
        is_last_use: nobody reads ``packed`` any more, so the sum may take its place.

    Raises:
        PeerError: another rank died, stalled or left; only outside of compiled graphs.
        ScheduleError: another rank has left the schedule that the ranks agreed on.
    """
    if group == NO_GROUP:
        return packed
    if packed.requires_grad and torch.is_grad_enabled():
        return _AllReduceSum.apply(packed, group, site)
    pending = start_all_reduce_sum(packed, group, site, is_last_use=is_last_use)
    return end_all_reduce_sum(pending, packed.size(0))


WAIT = torch.ops._c10d_functional.wait_tensor.default
"""The op that ends a functional collective."""


def is_launch(target: Any) -> bool:
    """Whether ``target``, of a node of a graph, launches a functional collective."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "_c10d_functional"
        and target is not WAIT
    )


MOST_GATHERED_BYTES = 64 * 1024
"""How much a rank receives at most in an all-gather in place of an all-reduce: 50 microseconds of a
network with 10 Gbit/s, about what one message costs."""


def start_all_reduce_sum(
    packed: Tensor, group: str, site: tuple[Any, ...] = (), *, is_last_use: bool = False
) -> list[Tensor]:
    """Launches :func:`all_reduce_sum`; :func:`end_all_reduce_sum` waits for the sum.

    Not differentiable.

    Args:
        packed: (K,), float64, of the same size on every rank.
        group: from :func:`active_group`, not ``NO_GROUP``.
        site: as :func:`all_reduce_sum` takes it.
        is_last_use: nobody reads ``packed`` any more, so the sum may take its place.

    Returns:
        For :func:`end_all_reduce_sum`: what is received, (K,) or (W * K,). And what is sent, if it
        must not change before: another graph may wait, of which a compiler knows nothing.
    """
    is_traced = is_compiling()
    is_plain = not is_traced and runs_unseen(packed)
    if not is_plain and _is_batched(packed):
        return [torch.ops.bnrewrite.all_reduce_now(packed, group)]
    name, num_ranks = parts_of(group)
    if num_ranks and packed.is_cpu and _is_small(packed, num_ranks):
        # In eager mode the caller may hand out parts of it, and whoever gets them may write there.
        sent = packed if is_traced else packed.clone()
        return [_start_all_gather(sent, group, num_ranks, site), sent]
    if is_plain:
        reduced = packed if is_last_use and packed.is_cuda else packed.clone()
        begin = lambda to: to.allreduce([reduced])  # noqa: E731
        return [launch("all-reduce", reduced, find_group(name), site, begin)]
    return [torch.ops._c10d_functional.all_reduce(packed, "sum", name)]


def _is_small(packed: Tensor, num_ranks: int) -> bool:
    return (num_ranks - 1) * packed.numel() * packed.element_size() <= MOST_GATHERED_BYTES


def end_all_reduce_sum(pending: Sequence[Tensor], size: int) -> Tensor:
    """(K,), K = ``size``: the sum that :func:`start_all_reduce_sum` has launched, once it is there.

    A second call, of what has been waited for, gives the sum again.
    """
    gathered = wait(pending[0])
    if gathered.size(0) == size:
        return gathered
    first, second, *others = gathered.view(-1, size).unbind()
    total = first + second
    for other in others:
        total = total + other
    return total


def wait(pending: Tensor) -> Tensor:
    """The result of a collective that was launched."""
    if not is_compiling() and is_watched(pending):
        return finish(pending)
    return torch.ops._c10d_functional.wait_tensor(pending)


def _wait_or_name(pending: Tensor, what: str, group: str, site: tuple[Any, ...]) -> Tensor:
    """:func:`wait`, with all of this in the error outside of compiled graphs."""
    if is_compiling() or is_watched(pending):
        return wait(pending)
    started = time.monotonic()
    try:
        return wait(pending)
    except RuntimeError as error:
        waited_s = time.monotonic() - started
        raise peer_error(what, group_of(group), site, waited_s, error) from error


class _AllReduceSum(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients, to any order."""

    @staticmethod
    def forward(ctx, packed: Tensor, group: str, site: tuple[Any, ...]) -> Tensor:
        ctx.group = group
        ctx.site = site
        return all_reduce_sum(packed.detach(), group, site)

    @staticmethod
    @runs_in_python
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce_sum(grad.contiguous(), ctx.group, ctx.site), None, None


def send_around(
    values: Tensor, group: str, place: tuple[int, int], shift: int, site: tuple[Any, ...] = ()
) -> Tensor:
    """What rank ``(rank + shift) % W`` holds: each rank sends and receives ``values`` once.

        4 ranks holding   a b c d     shift 1 ->   b c d a     shift -1 ->   d a b c

    Differentiable to any order: the gradient is sent back the way the values came.

    Args:
        values: (K,), of the same size and dtype on every rank.
        group: from :func:`active_group`, not ``NO_GROUP``.
        place: of this rank, from :func:`place_in`.
        shift: how many ranks ahead the sender is, 1 or -1.
        site: as :func:`all_reduce_sum` takes it.
    """
    if torch.is_grad_enabled() and values.requires_grad:
        return _SendAround.apply(values, group, place, shift, site)
    if _is_batched(values):
        return torch.ops.bnrewrite.send_around_now(values, group, *place, shift)
    rank, size = place
    num_sent, num_received = [0] * size, [0] * size
    num_sent[(rank - shift) % size] = values.size(0)
    num_received[(rank + shift) % size] = values.size(0)
    if not is_compiling() and runs_unseen(values):
        received = torch.empty_like(values)
        begin = lambda to: to.alltoall_base(received, values, num_received, num_sent)  # noqa: E731
        return finish(launch("exchange", received, group_of(group), site, begin))
    sizes = num_received, num_sent
    received = torch.ops._c10d_functional.all_to_all_single(values, *sizes, name_in(group))
    return _wait_or_name(received, "exchange", group, site)


class _SendAround(torch.autograd.Function):
    """:func:`send_around` with its gradient."""

    @staticmethod
    def forward(ctx, values, group, place, shift, site) -> Tensor:
        ctx.way_back = group, place, -shift, site
        return send_around(values.detach(), group, place, shift, site)

    @staticmethod
    @runs_in_python
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return send_around(grad.contiguous(), *ctx.way_back), None, None, None, None


def all_gather(values: Tensor, group: str, world_size: int, site: tuple[Any, ...] = ()) -> Tensor:
    """(W, K): ``values`` (K,) of every rank of ``group``, in order: the same bits on every rank.

    Not differentiable; see :func:`receive_from`.
    """
    if _is_batched(values):
        return torch.ops.bnrewrite.all_gather_now(values, group, world_size)
    pending = _start_all_gather(values, group, world_size, site)
    return _wait_or_name(pending, "all-gather", group, site).view(world_size, -1)


def _start_all_gather(values: Tensor, group: str, world_size: int, site: tuple[Any, ...]) -> Tensor:
    """Launches an all-gather into (W * K,)."""
    if not is_compiling() and runs_unseen(values):
        table = values.new_empty(world_size * values.numel())
        begin = lambda to: to._allgather_base(table, values)  # noqa: E731
        return launch("all-gather", table, group_of(group), site, begin)
    return torch.ops._c10d_functional.all_gather_into_tensor(values, world_size, name_in(group))


def receive_from(
    values: Tensor, group: str, world_size: int, peers: Tensor, site: tuple[Any, ...] = ()
) -> Tensor:
    """What rank ``peers[0]`` holds, for a permutation that only the device knows.

    It costs an all-gather: each rank receives W * K values to use K of them, because a send needs
    its destination on the host. Differentiable to any order.

    Args:
        values: (K,), of the same size and dtype on every rank.
        group: from :func:`active_group`, not ``NO_GROUP``.
        world_size: number of its ranks.
        peers: (2,), int64: the rank to receive from, and the rank that receives from this one.
        site: as :func:`all_reduce_sum` takes it.
    """
    if torch.is_grad_enabled() and values.requires_grad:
        return _ReceiveFrom.apply(values, group, world_size, peers, site)
    return all_gather(values, group, world_size, site).index_select(0, peers[:1])[0]


class _ReceiveFrom(torch.autograd.Function):
    """:func:`receive_from` with its gradient."""

    @staticmethod
    def forward(ctx, values, group, world_size, peers, site) -> Tensor:
        ctx.save_for_backward(peers)
        ctx.group = group
        ctx.world_size = world_size
        ctx.site = site
        return receive_from(values.detach(), group, world_size, peers, site)

    @staticmethod
    @runs_in_python
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (peers,) = ctx.saved_tensors
        peers = peers.flip(0)
        grad = receive_from(grad.contiguous(), ctx.group, ctx.world_size, peers, ctx.site)
        return grad, None, None, None, None


def all_gather_numbers(numbers: list[int], group: str, device: torch.device) -> list[list[int]]:
    """``numbers`` of every rank of ``group``, on the host, which waits for them."""
    values = torch.tensor(numbers, dtype=torch.int64, device=device)
    return all_gather(values, group, place_in(group)[1]).tolist()


def exchange_rows(rows: Tensor, group: str, num_sent: list[int], num_received: list[int]) -> Tensor:
    """Sends consecutive rows to the ranks of ``group`` in order; what they sent, in order.

    Not differentiable. Rows travel as bytes, since not every backend knows every dtype.

    Args:
        rows: (N, *), contiguous.
        group: from :func:`active_group`, not ``NO_GROUP``.
        num_sent: for each rank the number of rows that it gets.
        num_received: for each rank the number of rows that come from it.

    Returns:
        (sum(num_received), *), as ``rows``.
    """
    row_bytes = rows[0].numel() * rows.element_size()
    payload = rows.view(-1).view(torch.uint8)
    received = torch.ops._c10d_functional.all_to_all_single(
        payload,
        [num * row_bytes for num in num_received],
        [num * row_bytes for num in num_sent],
        name_in(group),
    )
    received = wait(received)
    return received.view(rows.dtype).view(-1, *rows.shape[1:])


def _is_batched(x: Tensor) -> bool:
    """Whether ``x`` is what ``is_grads_batched`` makes of several gradients.

    It calls ops once for each of them. Were a launch and its end two ops, the end would be given
    what is put together of results that are under way.
    """
    return not is_compiling() and torch._C._functorch.is_legacy_batchedtensor(x)


_FRAGMENT = torch.library.Library("bnrewrite", "FRAGMENT")


def _define(schema: str, function: Callable[..., Tensor]) -> None:
    """A collective with its end as one op."""
    _FRAGMENT.define(schema)
    _FRAGMENT.impl(schema.split("(", 1)[0], function, "CompositeExplicitAutograd")


_define(
    "all_reduce_now(Tensor packed, str group) -> Tensor",
    lambda packed, group: end_all_reduce_sum(start_all_reduce_sum(packed, group), packed.size(0)),
)
_define(
    "send_around_now(Tensor values, str group, int rank, int size, int shift) -> Tensor",
    lambda values, group, rank, size, shift: send_around(values, group, (rank, size), shift),
)
_define("all_gather_now(Tensor values, str group, int world_size) -> Tensor", all_gather)
