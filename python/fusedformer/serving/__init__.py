"""Encoders behind CUDA graphs, and kernels compiled before the first request."""

from fusedformer.serving.graphs import Graphed, graphed
from fusedformer.serving.warmup import warmup

__all__ = ["Graphed", "graphed", "warmup"]
