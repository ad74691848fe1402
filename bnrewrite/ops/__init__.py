"""The ops registered with ``torch.library`` under the namespace ``bnrewrite``, one file each.

``batch_norm`` is what rewritten graphs call. It is made of four phases that never communicate and
of the collectives between them, all visible to a compiler:

    forward    moments -> all-reduce -> normalize
    backward   normalize_backward_reduce -> all-reduce -> normalize_backward
"""

from bnrewrite.ops import batch_norm as batch_norm
