"""The ops registered with ``torch.library`` under the namespace ``bnrewrite``, one file each.

``batch_norm`` is what rewritten graphs call. It is made of four phases that never communicate and
of the collectives between them, all visible to a compiler:

    forward    moments -> all-reduce -> normalize
    backward   normalize_backward_reduce -> all-reduce -> normalize_backward

Three more, of a collective with its end, are where tensors are sent: ``bnrewrite.collectives``.

``batch_norm_act`` is ``batch_norm`` with the residual and the activation that follow it.

``start_batch_norm`` and ``finish_batch_norm`` are the same for several sites at once, which share
their collectives, with what follows each. Two sites of them whose results are added become one in
every phase but the moments, where arithmetic is free: ``normalize_two``,
``normalize_two_backward_reduce`` and ``normalize_two_backward``.

An all-reduce is an all-gather and a sum where that takes less time: see
:mod:`bnrewrite.collectives`. In eager mode other work runs during that of a backward: see
:mod:`bnrewrite.ops.slot`.

On the CPU an evaluation that shares its statistics with nobody is ``batch_norm_local`` and
``batch_norm_local_backward`` instead, which join the phases of a direction.

``shuffle_batch_norm`` is the same for statistics that ranks borrow from each other, with a send in
place of the all-reduce.
"""

from bnrewrite.ops import batch_norm as batch_norm
from bnrewrite.ops import batch_norm_act as batch_norm_act
from bnrewrite.ops import shared_batch_norm as shared_batch_norm
from bnrewrite.ops import shuffle_batch_norm as shuffle_batch_norm
