"""Fused Triton kernels for Transformer encoders, as drop-in ``torch.nn`` modules.

>>> from fusedformer import functional as F, nn
>>> layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True)
"""

from fusedformer import functional, nn
from fusedformer._internal.backend import backend
from fusedformer._internal.products import set_float32_products
from fusedformer._version import __version__
from fusedformer.embedding import embed
from fusedformer.fusion import FusionReport, fuse, unfuse
from fusedformer.serving.graphs import Graphed, graphed
from fusedformer.serving.warmup import warmup

__all__ = [
    "FusionReport", "Graphed", "__version__", "backend", "embed", "functional", "fuse", "graphed",
    "nn", "set_float32_products", "unfuse", "warmup",
]  # fmt: skip
