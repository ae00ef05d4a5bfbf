"""Training and inference over several processes of ``torch.distributed``.

Tensor parallelism by ``parallelize_module``: :func:`tensor_parallel_plan`,
:class:`TransformerParallel`.

Importing this package teaches DTensor how the library's ops are sharded on the ``triton`` backend:
over batch and heads, or rows, forward and backward, without communication.
"""

from fusedformer.distributed import _sharding  # noqa: F401
from fusedformer.distributed._tensor_parallel import TransformerParallel, tensor_parallel_plan

__all__ = ["TransformerParallel", "tensor_parallel_plan"]
