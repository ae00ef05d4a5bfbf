"""Define each op as plain torch mathematics, in any dtype, float64 included.

Differentiable by autograd in every floating-point argument. Dropout takes its mask ``keep`` as an
argument. Nothing here is fast, and nothing here imports more than torch.
"""

from fusedformer.reference.activation import bias_activation, gated_activation
from fusedformer.reference.attention import (
    attention_weights,
    merge_attention_states,
    relative_position_bias,
    scaled_dot_product_attention,
    varlen_attention,
)
from fusedformer.reference.contrastive import contrastive_loss, sigmoid_contrastive_loss
from fusedformer.reference.cross_entropy import cross_entropy, linear_cross_entropy
from fusedformer.reference.disentangled import disentangled_attention
from fusedformer.reference.embedding import embedding_layer_norm
from fusedformer.reference.norm import (
    dropout_add,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    dropout_scale_add,
    layer_norm,
    rms_norm,
)
from fusedformer.reference.packing import pack, unpack
from fusedformer.reference.rotary import rotary_embedding
from fusedformer.reference.softmax import log_softmax, softmax

__all__ = [
    "attention_weights",
    "bias_activation",
    "contrastive_loss",
    "cross_entropy",
    "disentangled_attention",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "dropout_scale_add",
    "embedding_layer_norm",
    "gated_activation",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "merge_attention_states",
    "pack",
    "relative_position_bias",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "sigmoid_contrastive_loss",
    "softmax",
    "unpack",
    "varlen_attention",
]
