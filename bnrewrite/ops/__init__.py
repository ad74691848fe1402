"""The ops registered with ``torch.library`` under the namespace ``bnrewrite``, one file each.

``batch_norm`` is what rewritten graphs call. It is made of four phases that never communicate and
of the collectives between them, all visible to a compiler:

    forward    moments -> all-reduce -> normalize
    backward   normalize_backward_reduce -> all-reduce -> normalize_backward

Three more ops, each a collective including its wait, are in ``bnrewrite.collectives``.

``batch_norm_act`` is ``batch_norm`` with the residual and the activation that follow it.

``start_batch_norm`` and ``finish_batch_norm`` do the same for several sites at once, which share
their collectives, including what follows each site. If the results of two of these sites are added,
the two become one in every phase except the moments, where arithmetic is free: ``normalize_two``,
``normalize_two_backward_reduce`` and ``normalize_two_backward``.

An all-reduce becomes an all-gather and a sum where that is faster: see
:mod:`bnrewrite.collectives`. In eager mode, other work runs during the collective of backward: see
:mod:`bnrewrite.ops.slot`.

On the CPU, an evaluation that does not share its statistics is ``batch_norm_local`` and
``batch_norm_local_backward`` instead, which combine the phases of one direction.

``shuffle_batch_norm`` does the same for statistics that ranks borrow from each other, with a send
instead of the all-reduce.
"""

from bnrewrite.ops import batch_norm as batch_norm
from bnrewrite.ops import batch_norm_act as batch_norm_act
from bnrewrite.ops import shared_batch_norm as shared_batch_norm
from bnrewrite.ops import shuffle_batch_norm as shuffle_batch_norm
