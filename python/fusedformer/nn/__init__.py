"""Drop-in modules: those of ``torch.nn`` by the same names, embeddings and contrastive losses.

Each subclass of a class of ``torch.nn`` has its constructor, state_dict, initialization, forward
and ``extra_repr``; the computation is :mod:`fusedformer.functional`'s.
"""

from fusedformer.nn.contrastive_loss import ContrastiveLoss, SigmoidContrastiveLoss
from fusedformer.nn.cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from fusedformer.nn.layer_norm import LayerNorm
from fusedformer.nn.multihead_attention import MultiheadAttention
from fusedformer.nn.positional_encoding import (
    LearnedPositionalEncoding,
    SinusoidalPositionalEncoding,
)
from fusedformer.nn.quick_gelu import QuickGELU
from fusedformer.nn.rms_norm import RMSNorm
from fusedformer.nn.scaled_dot_product_attention import ScaledDotProductAttention
from fusedformer.nn.softmax import LogSoftmax, Softmax
from fusedformer.nn.token_embedding import TokenEmbedding
from fusedformer.nn.tracers import introduce
from fusedformer.nn.transformer import Transformer
from fusedformer.nn.transformer_decoder import TransformerDecoder
from fusedformer.nn.transformer_decoder_layer import TransformerDecoderLayer
from fusedformer.nn.transformer_encoder import TransformerEncoder
from fusedformer.nn.transformer_encoder_layer import TransformerEncoderLayer

__all__ = [
    "ContrastiveLoss",
    "CrossEntropyLoss",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MultiheadAttention",
    "QuickGELU",
    "RMSNorm",
    "ScaledDotProductAttention",
    "SigmoidContrastiveLoss",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "TokenEmbedding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

introduce(globals()[name] for name in __all__)
