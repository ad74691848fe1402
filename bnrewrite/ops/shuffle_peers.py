"""The op ``shuffle_peers``: who borrows statistics from whom, computed on the device."""

from torch import Tensor

from bnrewrite import permutations
from bnrewrite.ops.library import define_phase


def _fake(step: Tensor, *_: object) -> Tensor:
    return step.new_empty((2,))


SHUFFLE_PEERS = define_phase(
    "shuffle_peers(Tensor step, SymInt site, int seed, int rank, int world_size) -> Tensor",
    cpu=permutations.shuffle_peers,
    cuda=permutations.shuffle_peers,
    fake=_fake,
    definition=permutations.shuffle_peers,
)
"""See :func:`bnrewrite.permutations.shuffle_peers`."""
