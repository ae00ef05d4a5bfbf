"""A layer as one node of autograd: ``node`` calls ``forward`` and ``backward``."""

from fusedformer.ops.encoder.arguments import EncoderParameters, EncoderSettings
from fusedformer.ops.encoder.node import encoder_layer, encoder_layer_is_one_node

__all__ = [
    "EncoderParameters",
    "EncoderSettings",
    "encoder_layer",
    "encoder_layer_is_one_node",
]
