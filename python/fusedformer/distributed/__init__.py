"""Training and inference over several processes of ``torch.distributed``.

Tensor parallelism by ``parallelize_module``: :func:`tensor_parallel_plan`,
:class:`TransformerParallel`.
"""

from fusedformer.distributed._tensor_parallel import TransformerParallel, tensor_parallel_plan

__all__ = ["TransformerParallel", "tensor_parallel_plan"]
