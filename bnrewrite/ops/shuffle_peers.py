"""The op ``shuffle_peers``: who borrows statistics from whom, computed on the device."""

from torch import Tensor

from bnrewrite import reference
from bnrewrite.ops.library import define_phase


def _fake(step: Tensor, *_: object) -> Tensor:
    return step.new_empty((2,))


SHUFFLE_PEERS = define_phase(
    "shuffle_peers(Tensor step, SymInt site, int seed, int rank, int world_size) -> Tensor",
    cpu=reference.shuffle_peers,
    cuda=reference.shuffle_peers,
    fake=_fake,
    definition=reference.shuffle_peers,
)
"""See :func:`bnrewrite.reference.shuffle_peers`."""
