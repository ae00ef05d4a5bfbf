"""Training and inference over several processes of ``torch.distributed``.

Tensor parallelism by ``parallelize_module``: :func:`tensor_parallel_plan`,
:class:`TransformerParallel`. Context parallelism, a sequence spread over ranks:
:func:`ring_attention`, :func:`ring_varlen_attention`, :func:`context_parallel`,
:func:`split_sequence`, :func:`join_sequence`, :func:`sum_gradients`. Batches of like cost for
packed data-parallel training: :class:`LengthBalancedSampler`, :func:`balanced_batches`.

Importing this package teaches DTensor how the library's ops are sharded on the ``triton`` backend:
over batch and heads, or rows, forward and backward, without communication.
"""

from fusedformer.distributed import _sharding  # noqa: F401
from fusedformer.distributed._balance import LengthBalancedSampler, balanced_batches
from fusedformer.distributed._context_parallel import context_parallel, sum_gradients
from fusedformer.distributed._ring import ring_attention, ring_varlen_attention
from fusedformer.distributed._sequence import join_sequence, split_sequence
from fusedformer.distributed._tensor_parallel import TransformerParallel, tensor_parallel_plan

__all__ = [
    "LengthBalancedSampler",
    "TransformerParallel",
    "balanced_batches",
    "context_parallel",
    "join_sequence",
    "ring_attention",
    "ring_varlen_attention",
    "split_sequence",
    "sum_gradients",
    "tensor_parallel_plan",
]
