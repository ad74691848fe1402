"""``shuffle_batch``: permutes the samples themselves across ranks, and puts them back afterwards.

This is the remedy of MoCo (He et al. 2019, section 3.3, https://arxiv.org/abs/1911.05722): the key
encoder sees regrouped batches, so the statistics of its BatchNorm layers say nothing about which
keys belong to which queries. It works with any BatchNorm, converted or not.
"""

import dataclasses
import struct
import zlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bnrewrite.collectives import all_gather_numbers, exchange_rows
from bnrewrite.groups import NO_GROUP, active_group, group_name, place_in
from bnrewrite.guards import runs_in_python


@torch.compiler.disable(reason="the host must know how many samples go where")
def shuffle_batch(
    x: Tensor,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Permutes samples at random across the ranks of a group, and returns the inverse.

        4 samples on 2 ranks    ab | cd    ->    da | bc    -> key encoder ->    restore: ab | cd

    Every sample moves once (all-to-all), and no rank gathers the whole batch. All ranks of the
    group must call it. Both directions are differentiable to any order. The host reads a few
    numbers from every rank and so waits for the device; under ``torch.compile`` this is a graph
    break.

    Args:
        x: (N, *), any dtype, with the same shape and dtype on every rank.
        group: the ranks to shuffle over: None for the default group, a process group or a
            one-dimensional ``DeviceMesh``. With one rank, or no group at all, ``x`` stays as it is.
        generator: the source of the permutation; None for torch's default CPU generator. Every
            rank draws one number from its own generator; that of the group's first rank is used.

    Returns:
        The shuffled samples, with the shape and dtype of ``x``, contiguous; and
        ``restore(features)``, which sends features (N, *) of the shuffled samples back to the ranks
        and positions that the samples came from. Features must have the same shape and dtype on
        all ranks.

    Raises:
        TypeError: ``x`` is not a tensor with a batch dimension, or another argument has the wrong
            type. ``restore`` raises it if its features are not a tensor.
        ValueError: shapes or dtypes differ between ranks (raised on all of them), or this rank is
            not in the group. ``restore`` raises it if the number of features is not the number of
            samples.
        GroupError: the group no longer exists.

    A failed call leaves ``generator`` as it was.
    """
    if not isinstance(x, Tensor) or x.dim() == 0:
        what = "a scalar tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a tensor (N, *) of samples, but it is {what}.")
    if generator is None:
        generator = torch.default_generator
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            "generator must be a torch.Generator, or None for torch's default one, but it is "
            f"{type(generator).__name__} ({generator!r})."
        )
    name = active_group(group_name(group), training=True)
    before = generator.get_state()
    try:
        return _shuffle(x, name, _draw_seed(generator))
    except BaseException:
        generator.set_state(before)
        raise


def _shuffle(x: Tensor, name: str, seed: int) -> tuple[Tensor, "_Restore"]:
    num_samples = x.size(0)
    if name == NO_GROUP:
        return x, _Restore(num_samples, None)
    rank, world_size = place_in(name)
    everyone = all_gather_numbers([seed, *_in_numbers(x)], name, x.device)
    if any(numbers[1:] != everyone[0][1:] for numbers in everyone):
        batches = [_in_words(numbers[1:]) for numbers in everyone]
        held = "; ".join(
            f"{one} on rank {', '.join(str(i) for i, other in enumerate(batches) if other == one)}"
            for one in dict.fromkeys(batches)
        )
        raise ValueError(
            f"shuffle_batch: ranks hold different batches ({held}); this is rank {rank}. Give "
            "every rank the same number of samples, e.g. with drop_last=True in the DataLoader, "
            "all of one shape and dtype. Mode 'shuffle' accepts batches of different sizes."
        )
    shuffled = torch.Generator().manual_seed(everyone[0][0])
    source = torch.randperm(world_size * num_samples, generator=shuffled)
    there = _Routes.of(source, rank, world_size, name)
    back = _Routes.of(torch.argsort(source), rank, world_size, name)
    return _Move.apply(x, there, back), _Restore(num_samples, (back, there))


_WORDS = "<15q"
"""So many numbers hold what is said of a batch, whatever its shape: all ranks send as many."""


def _in_numbers(x: Tensor) -> list[int]:
    """What ``x`` is, dtype and shape, and a checksum of them, since long ones are cut off."""
    words = f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.").encode()
    size = struct.calcsize(_WORDS)
    return [zlib.crc32(words), *struct.unpack(_WORDS, words[:size].ljust(size))]


def _in_words(numbers: list[int]) -> str:
    return struct.pack(_WORDS, *numbers[1:]).decode().rstrip()


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 62, (), generator=generator, device=generator.device))


@dataclasses.dataclass(frozen=True)
class _Routes:
    """Which of its samples a rank sends where, and how it arranges what it gets.

    Attributes:
        group: name of the process group.
        send_order: (N,): the rank's samples in the order of their destinations.
        num_sent: for each rank the number of samples that it gets.
        num_received: for each rank the number of samples that come from it.
        arrange: (N,): for each place of the new batch the received sample that belongs there.
    """

    group: str
    send_order: Tensor
    num_sent: list[int]
    num_received: list[int]
    arrange: Tensor

    @classmethod
    def of(cls, source: Tensor, rank: int, world_size: int, group: str) -> "_Routes":
        """Routes of ``rank`` if place i of all ranks' batches gets sample ``source[i]``."""
        num_samples = source.numel() // world_size
        owners = torch.div(source, max(num_samples, 1), rounding_mode="floor")
        mine = owners[rank * num_samples : (rank + 1) * num_samples]
        # Samples of one sender arrive in the order of the places that they are for.
        arrange = torch.argsort(torch.argsort(mine, stable=True))
        places = (owners == rank).nonzero().flatten()
        destinations = torch.div(places, max(num_samples, 1), rounding_mode="floor")
        return cls(
            group,
            source[places] - rank * num_samples,
            torch.bincount(destinations, minlength=world_size).tolist(),
            torch.bincount(mine, minlength=world_size).tolist(),
            arrange,
        )


class _Move(torch.autograd.Function):
    """Moves samples along routes; gradients take the inverse routes."""

    @staticmethod
    def forward(ctx, x: Tensor, there: _Routes, back: _Routes) -> Tensor:
        ctx.routes = there, back
        if x.numel() == 0:
            return x.clone()
        rows = x.index_select(0, there.send_order.to(x.device)).contiguous()
        rows = exchange_rows(rows, there.group, there.num_sent, there.num_received)
        return rows.index_select(0, there.arrange.to(x.device))

    @staticmethod
    @runs_in_python
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.routes
        return _Move.apply(grad, back, there), None, None  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True)
class _Restore:
    """The inverse of :func:`shuffle_batch`."""

    num_samples: int
    routes: tuple[_Routes, _Routes] | None

    @torch.compiler.disable(reason="the host must know how many samples go where")
    def __call__(self, features: Tensor) -> Tensor:
        """Sends features (N, *) of the shuffled samples back to where the samples came from."""
        if not isinstance(features, Tensor):
            raise TypeError(
                "restore: features must be a tensor (N, *), one row per shuffled sample, but it is "
                f"{type(features).__name__}."
            )
        if features.dim() == 0 or features.size(0) != self.num_samples:
            raise ValueError(
                f"restore: features has shape {tuple(features.shape)}, but shuffle_batch returned "
                f"{self.num_samples} samples. Pass one row per shuffled sample, in the same order."
            )
        return features if self.routes is None else _Move.apply(features, *self.routes)  # pyright: ignore[reportReturnType]
