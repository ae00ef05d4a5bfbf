"""Run the ops, a file each: register with ``torch.library``, differentiate, choose backends."""

from fusedformer.ops._shared import draw_seed, seeds_added_to, seeds_drawn_at_once
from fusedformer.ops.activation import bias_activation
from fusedformer.ops.attention import (
    DisentangledInputs,
    DisentangledSettings,
    attention_part,
    attention_part_backward,
    attention_terms,
    check_for_kernels,
    disentangled_attention,
    merge_attention_states,
    merge_parts,
    scale_of,
    scaled_attention,
    scaled_dot_product_attention,
    self_attention,
    self_attention_terms,
    varlen_attention,
    window_bounds,
)
from fusedformer.ops.contrastive import contrastive_loss, sigmoid_contrastive_loss
from fusedformer.ops.cross_entropy import cross_entropy
from fusedformer.ops.embedding import embedding_layer_norm
from fusedformer.ops.encoder import (
    EncoderParameters,
    EncoderSettings,
    encoder_layer,
    encoder_layer_is_one_node,
)
from fusedformer.ops.gated import gated_activation
from fusedformer.ops.linear import FeedForward, feed_forward, linear
from fusedformer.ops.linear_cross_entropy import linear_cross_entropy
from fusedformer.ops.norm import (
    dropout_add,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    layer_norm,
    rms_norm,
)
from fusedformer.ops.packing import (
    TokenMask,
    TokenPlaces,
    gather_rows,
    shared_by_layers,
    starts_of,
    token_places,
)
from fusedformer.ops.relative_position import relative_position_bias
from fusedformer.ops.rotary import rotary_embedding, rotated
from fusedformer.ops.scaled_sum import dropout_scale_add
from fusedformer.ops.softmax import softmax

__all__ = [
    "DisentangledInputs",
    "DisentangledSettings",
    "EncoderParameters",
    "EncoderSettings",
    "FeedForward",
    "TokenMask",
    "TokenPlaces",
    "attention_part",
    "attention_part_backward",
    "attention_terms",
    "bias_activation",
    "check_for_kernels",
    "contrastive_loss",
    "cross_entropy",
    "disentangled_attention",
    "draw_seed",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "dropout_scale_add",
    "embedding_layer_norm",
    "encoder_layer",
    "encoder_layer_is_one_node",
    "feed_forward",
    "gated_activation",
    "gather_rows",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_attention_states",
    "merge_parts",
    "relative_position_bias",
    "rms_norm",
    "rotary_embedding",
    "rotated",
    "scale_of",
    "scaled_attention",
    "scaled_dot_product_attention",
    "seeds_added_to",
    "seeds_drawn_at_once",
    "self_attention",
    "self_attention_terms",
    "shared_by_layers",
    "sigmoid_contrastive_loss",
    "softmax",
    "starts_of",
    "token_places",
    "varlen_attention",
    "window_bounds",
]
