"""Describe the layers of encoders of text: where each family keeps what, and what sets it apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fusedformer.fusion import _biases
from fusedformer.fusion._disentangled import Disentangled, WithBiases
from fusedformer.fusion._forms import Form

BERT = Form(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    norm1="attention.output.LayerNorm",
    norm2="output.LayerNorm",
    linear1="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    linear2="output.dense",
    attention_dropout="attention.self.dropout",
    dropout1="attention.output.dropout",
    dropout2="output.dropout",
)
DISTILBERT = Form(
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    norm1="sa_layer_norm",
    norm2="output_layer_norm",
    linear1="ffn.lin1",
    activation="ffn.activation",
    linear2="ffn.lin2",
    attention_dropout="attention.dropout",
    dropout2="ffn.dropout",
)
ALBERT = Form(
    attention="attention",
    query="attention.query",
    key="attention.key",
    value="attention.value",
    out="attention.dense",
    norm1="attention.LayerNorm",
    norm2="full_layer_layer_norm",
    linear1="ffn",
    activation="activation",
    linear2="ffn_output",
    attention_dropout="attention.attention_dropout",
    dropout1="attention.output_dropout",
)
MODERNBERT = Form(
    attention="attn",
    query="attn.Wqkv",
    out="attn.Wo",
    norm1="attn_norm",
    norm2="mlp_norm",
    linear1="mlp.Wi",
    activation="mlp.act",
    linear2="mlp.Wo",
    attention_dropout="attn.attention_dropout",
    dropout1="attn.out_drop",
    hidden_dropout="mlp.drop",
    norms_first=True,
    is_gated=True,
    rotary="position_embeddings",
    head_dim="head_dim",
    scaling=None,
    window="sliding_window",
)

LLAMA = Form(
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    linear1="mlp.up_proj",
    gate="mlp.gate_proj",
    activation="mlp.act_fn",
    linear2="mlp.down_proj",
    attention_dropout="self_attn.attention_dropout",
    norms_first=True,
    rotary="position_embeddings",
    head_dim="head_dim",
)
QWEN3 = dataclasses.replace(
    LLAMA, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", window="sliding_window"
)
GEMMA3 = dataclasses.replace(
    QWEN3,
    norm2="pre_feedforward_layernorm",
    out_norm="post_attention_layernorm",
    block_norm="post_feedforward_layernorm",
)
ESMC = dataclasses.replace(
    LLAMA,
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    norms_all_heads=True,
    divisor="scaling_factor",
)


def _per_layer_embedding(layer: Any, x: Tensor, given: dict[str, Any]) -> Tensor:
    """Return the sum behind the third block of EmbeddingGemma 2's layer."""
    found: Tensor = layer.ple_block(x, given["per_layer_input"]) * layer.layer_scalar
    return found


EMBEDDING_GEMMA2 = dataclasses.replace(
    GEMMA3, value_norm="self_attn.v_norm", adapter=_per_layer_embedding
)
T5GEMMA = dataclasses.replace(
    GEMMA3,
    norm1="pre_self_attn_layernorm",
    out_norm="post_self_attn_layernorm",
    query_norm=None,
    key_norm=None,
    dropout1="dropout",
    hidden_dropout="mlp.dropout",
    dropout2="dropout",
    drops_normed=True,
    softcap="attn_logit_softcapping",
    window=lambda attention: attention.sliding_window and attention.sliding_window + 1,
    hands_on=False,  # its windows are those of flash attention, narrower by one than its masks'
)


def _halves(attention: Any) -> tuple[int, int] | None:
    """Return how far the windows of T5Gemma 2 reach, one more behind than before if even."""
    window = attention.sliding_window
    return None if window is None else ((window + 1) // 2 - 1, window // 2)


T5GEMMA2 = dataclasses.replace(
    T5GEMMA,
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    softcap=None,
    window=_halves,
)
T5 = Form(
    attention="layer.0.SelfAttention",
    query="layer.0.SelfAttention.q",
    key="layer.0.SelfAttention.k",
    value="layer.0.SelfAttention.v",
    out="layer.0.SelfAttention.o",
    norm1="layer.0.layer_norm",
    norm2="layer.1.layer_norm",
    linear1="layer.1.DenseReluDense.wi|wi_1",
    gate="layer.1.DenseReluDense.wi_0",
    activation="layer.1.DenseReluDense.act",
    linear2="layer.1.DenseReluDense.wo",
    attention_dropout="layer.0.SelfAttention.dropout",
    dropout1="layer.0.dropout",
    hidden_dropout="layer.1.DenseReluDense.dropout",
    dropout2="layer.1.dropout",
    buckets="layer.0.SelfAttention.relative_attention_bias",
    norms_first=True,
    head_dim="key_value_proj_dim",
    returns_bias=True,
    clamps_half=True,
)
UMT5 = dataclasses.replace(T5, returns_bias=False)
ESM = dataclasses.replace(
    BERT,
    norm1="attention.LayerNorm",
    norm2="LayerNorm",
    activation=F.gelu,
    norms_first=True,
    rotary="position_embeddings",
    scaling=None,
)
NOMIC_BERT = dataclasses.replace(
    LLAMA,
    norm1="post_attention_layernorm",
    norm2="post_mlp_layernorm",
    dropout1="post_attention_dropout",
    dropout2="post_mlp_dropout",
    norms_first=False,
)
GTE = dataclasses.replace(NOMIC_BERT, hidden_dropout="mlp.dropout")
JINA = dataclasses.replace(
    NOMIC_BERT, linear1="mlp.fc1", gate=None, activation="mlp.activation_fn", linear2="mlp.fc2"
)
PRE_NORM = dataclasses.replace(
    BERT, norm1="attention.LayerNorm", norm2="intermediate.LayerNorm", norms_first=True
)
XLM_ROBERTA_XL = dataclasses.replace(
    BERT,
    norm1="attention.self_attn_layer_norm",
    norm2="LayerNorm",
    dropout2=None,
    norms_first=True,
)


def _language_adapter(layer: Any, x: Tensor, given: dict[str, Any]) -> Tensor:
    """Return the sum behind the adapters of X-MOD's layer, one for the language of each token."""
    found: Tensor = layer.output.lang_adapter(given["lang_ids"], x)
    return found


XMOD = dataclasses.replace(BERT, norms_first="pre_norm", adapter=_language_adapter)
# Its attention has a dropout that it does not use.
LAYOUTLM = dataclasses.replace(BERT, attention_dropout="attention.self.attention_dropout")
# Those of models that take no registered attention.
SPLINTER = dataclasses.replace(LAYOUTLM, scaling=None, is_causal=False, attends_itself=True)
TEXT_TOWER = dataclasses.replace(SPLINTER, scaling="scaling")
REMBERT = dataclasses.replace(
    SPLINTER, attention_dropout=BERT.attention_dropout, returns_tuple=True
)
LAYOUTLMV3 = dataclasses.replace(
    REMBERT, returns_tuple=False, position_bias=_biases.bias_of_layoutlmv3
)
MEGATRON_BERT = dataclasses.replace(REMBERT, norm1="attention.ln", norm2="ln", norms_first=True)
ROFORMER = dataclasses.replace(
    REMBERT,
    rotary="sinusoidal_pos",
    rotary_in_one=True,
    angles="once",
    interleaved=True,
    unless="attention.self.rotary_value",
)
MPNET = dataclasses.replace(
    REMBERT,
    attention="attention.attn",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    out="attention.attn.o",
    norm1="attention.LayerNorm",
    attention_dropout="attention.attn.dropout",
    dropout1="attention.dropout",
)
DEBERTA_V2 = dataclasses.replace(
    BERT,
    query="attention.self.query_proj",
    key="attention.self.key_proj",
    value="attention.self.value_proj",
    attends_itself=True,
    own=Disentangled(),
    returns_tuple=True,
)
DEBERTA = dataclasses.replace(
    DEBERTA_V2,
    query="attention.self.in_proj",
    key=None,
    value=None,
    by_head=True,
    own=WithBiases("pos_proj", "pos_q_proj"),
)
