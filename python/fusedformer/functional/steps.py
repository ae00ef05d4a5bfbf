"""Call steps of encoder and decoder layers; for the modules, which check their arguments.

They are not public; each is documented where it is defined.
"""

from fusedformer.ops import EncoderParameters as EncoderParameters
from fusedformer.ops import EncoderSettings as EncoderSettings
from fusedformer.ops import FeedForward as FeedForward
from fusedformer.ops import dropout_add_layer_norm as dropout_add_layer_norm
from fusedformer.ops import encoder_layer as encoder_layer
from fusedformer.ops import encoder_layer_is_one_node as encoder_layer_is_one_node
from fusedformer.ops import feed_forward as feed_forward
from fusedformer.ops import linear as linear
from fusedformer.ops import scaled_attention as scaled_attention
from fusedformer.ops import seeds_added_to as seeds_added_to
from fusedformer.ops import seeds_drawn_at_once as seeds_drawn_at_once
from fusedformer.ops import self_attention as self_attention
from fusedformer.ops import self_attention_terms as self_attention_terms
from fusedformer.ops.attention.terms import AttentionTerms as AttentionTerms
from fusedformer.ops.layer_compiled import Block as Block
from fusedformer.ops.layer_compiled import block_compiled as block_compiled
from fusedformer.ops.layer_compiled import enough_rows as enough_rows
from fusedformer.ops.layer_compiled import projections_compiled as projections_compiled
from fusedformer.ops.norm_aten import add_norm_aten as add_norm_aten
from fusedformer.ops.norm_aten import norm_aten as norm_aten
from fusedformer.ops.product import product as product
from fusedformer.ops.product import product_activation as product_activation
