"""Call the public functions: those of ``torch.nn.functional``, and the fused forms.

Each function checks its arguments, then calls the op of the same name in :mod:`fusedformer.ops`,
which runs the Triton kernels or the ATen composition (see :func:`fusedformer.backend`). The
definition of each is in :mod:`fusedformer.reference`.

Supported dtypes: float32, float16 and bfloat16 on the triton backend, any floating-point dtype on
the torch backend. Statistics and accumulation are float32 (float64 for float64 input).
"""

from fusedformer.functional._activation import ACTIVATIONS as ACTIVATIONS
from fusedformer.functional._activation import Activation as Activation
from fusedformer.functional._activation import bias_activation, gated_activation
from fusedformer.functional._attention import (
    merge_attention_states,
    relative_position_bias,
    scaled_dot_product_attention,
    varlen_attention,
)
from fusedformer.functional._contrastive import REDUCTIONS as REDUCTIONS
from fusedformer.functional._contrastive import Reduction as Reduction
from fusedformer.functional._contrastive import contrastive_loss, sigmoid_contrastive_loss
from fusedformer.functional._cross_entropy import cross_entropy, linear_cross_entropy
from fusedformer.functional._disentangled import disentangled_attention
from fusedformer.functional._embedding import embedding_layer_norm
from fusedformer.functional._norm import (
    dropout_add,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    dropout_scale_add,
    layer_norm,
    rms_norm,
)
from fusedformer.functional._rotary import rotary_embedding
from fusedformer.functional._softmax import log_softmax, softmax
from fusedformer.functional.packing import Packing as Packing
from fusedformer.functional.packing import pack, unpack
from fusedformer.functional.selection import Selection as Selection

__all__ = [
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
