"""Training and inference over several processes of ``torch.distributed``.

Context parallelism, a sequence spread over ranks: :func:`ring_attention`,
:func:`ring_varlen_attention`, :func:`context_parallel`, :func:`split_sequence`,
:func:`join_sequence`, :func:`sum_gradients`. Batches of like cost for packed data-parallel
training: :class:`LengthBalancedSampler`, :func:`balanced_batches`.
"""

from fusedformer.distributed._balance import LengthBalancedSampler, balanced_batches
from fusedformer.distributed._context_parallel import context_parallel, sum_gradients
from fusedformer.distributed._ring import ring_attention, ring_varlen_attention
from fusedformer.distributed._sequence import join_sequence, split_sequence

__all__ = [
    "LengthBalancedSampler",
    "balanced_batches",
    "context_parallel",
    "join_sequence",
    "ring_attention",
    "ring_varlen_attention",
    "split_sequence",
    "sum_gradients",
]
