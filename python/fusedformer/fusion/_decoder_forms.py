"""Describe the layers of language models: where each family keeps what, and what sets it apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fusedformer.fusion._forms import Form
from fusedformer.fusion._text_forms import GEMMA3, LLAMA, QWEN3

QWEN2 = dataclasses.replace(LLAMA, window="sliding_window")
MISTRAL = dataclasses.replace(LLAMA, window="config.sliding_window")
GEMMA2 = dataclasses.replace(
    GEMMA3, query_norm=None, key_norm=None, softcap="attn_logit_softcapping"
)
GRANITE = dataclasses.replace(LLAMA, scale1="residual_multiplier", scale2="residual_multiplier")
HYPERCLOVAX = dataclasses.replace(GRANITE, out_norm="post_norm1", block_norm="post_norm2")
OLMO2 = dataclasses.replace(
    QWEN3,
    norm1=None,
    norm2=None,
    out_norm="post_attention_layernorm",
    block_norm="post_feedforward_layernorm",
    norms_all_heads=True,
    window=None,
)
OLMO3 = dataclasses.replace(OLMO2, window="sliding_window")
EXAONE4 = dataclasses.replace(
    OLMO3,
    norms_all_heads=False,
    window=lambda attention: attention.sliding_window if attention.is_sliding else None,
    turns=lambda attention: attention.sliding_window is None or attention.is_sliding,
)
SMOLLM3 = dataclasses.replace(QWEN2, turns=lambda attention: attention.use_rope)
SEED_OSS = dataclasses.replace(
    LLAMA, dropout1="self_attn.residual_dropout", dropout2="mlp.residual_dropout"
)
STARCODER2 = dataclasses.replace(
    MISTRAL,
    linear1="mlp.c_fc",
    gate=None,
    activation="mlp.act",
    linear2="mlp.c_proj",
    dropout1="self_attn.residual_dropout",
    dropout2="mlp.residual_dropout",
)
ARCEE = dataclasses.replace(LLAMA, gate=None)
APERTUS = dataclasses.replace(
    ARCEE,
    norm1="attention_layernorm",
    norm2="feedforward_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)
PHI3 = dataclasses.replace(
    MISTRAL,
    query="self_attn.qkv_proj",
    key=None,
    value=None,
    linear1="mlp.gate_up_proj",
    gate=None,
    activation="mlp.activation_fn",
    is_gated=True,
    dropout1="resid_attn_dropout",
    dropout2="resid_mlp_dropout",
)
# Of GLM, pairs of columns are neighbours.
HELIUM = dataclasses.replace(LLAMA, interleaved=True)
GLM = dataclasses.replace(
    HELIUM,
    linear1="mlp.gate_up_proj",
    gate=None,
    activation="mlp.activation_fn",
    is_gated=True,
)
GLM4 = dataclasses.replace(
    GLM, out_norm="post_self_attn_layernorm", block_norm="post_mlp_layernorm"
)
GLM4V = dataclasses.replace(GLM4, angles="pairs")
GLM_IMAGE = dataclasses.replace(GLM4, interleaved=False)
STABLELM = dataclasses.replace(
    LLAMA, dropout2="dropout", parallel="use_parallel_residual", unless="self_attn.qk_layernorm"
)
PHI = dataclasses.replace(
    LLAMA,
    out="self_attn.dense",
    norm2=None,
    linear1="mlp.fc1",
    gate=None,
    activation="mlp.activation_fn",
    linear2="mlp.fc2",
    dropout1="resid_dropout",
    dropout2="resid_dropout",
    parallel=True,
    query_norm="self_attn.q_layernorm",
    key_norm="self_attn.k_layernorm",
)
GPT_NEOX = dataclasses.replace(
    LLAMA,
    attention="attention",
    query="attention.query_key_value",
    key=None,
    value=None,
    by_head=True,
    out="attention.dense",
    linear1="mlp.dense_h_to_4h",
    gate=None,
    activation="mlp.act",
    linear2="mlp.dense_4h_to_h",
    attention_dropout="attention.attention_dropout",
    dropout1="post_attention_dropout",
    dropout2="post_mlp_dropout",
    parallel="use_parallel_residual",
    head_dim="head_size",
)
PERSIMMON = dataclasses.replace(
    LLAMA,
    query="self_attn.query_key_value",
    key=None,
    value=None,
    by_head=True,
    out="self_attn.dense",
    linear1="mlp.dense_h_to_4h",
    gate=None,
    activation="mlp.act",
    linear2="mlp.dense_4h_to_h",
    attention_dropout="self_attn.attention_dropout",
    dropout2="dropout",
    query_norm="self_attn.q_layernorm",
    key_norm="self_attn.k_layernorm",
)
EMU3 = dataclasses.replace(LLAMA, dropout1="dropout", dropout2="dropout")
VAULTGEMMA = dataclasses.replace(GEMMA2, out_norm=None, block_norm=None)
OPT = Form(
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    norm1="self_attn_layer_norm",
    norm2="final_layer_norm",
    linear1="fc1",
    activation="activation_fn",
    linear2="fc2",
    attention_dropout="self_attn.dropout",
    dropout1="dropout",
    dropout2="dropout",
    norms_first="do_layer_norm_before",
    head_dim="head_dim",
)
BIOGPT = dataclasses.replace(OPT, hidden_dropout="activation_dropout", norms_first=True)
GPT2 = Form(
    attention="attn",
    query="attn.c_attn",
    out="attn.c_proj",
    norm1="ln_1",
    norm2="ln_2",
    linear1="mlp.c_fc",
    activation="mlp.act",
    linear2="mlp.c_proj",
    attention_dropout="attn.attn_dropout",
    dropout1="attn.resid_dropout",
    dropout2="mlp.dropout",
    norms_first=True,
    head_dim="head_dim",
)
GPT_BIGCODE = dataclasses.replace(GPT2, by_head=lambda attention: not attention.multi_query)


def _scale_of_position(attention: Any, given: dict[str, Any]) -> Tensor:
    """Return Llama 4's factors of queries ``[batch, 1, length, 1]``, which grow with positions."""
    rope = attention.config.rope_parameters
    beta, longest = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    steps = torch.floor(given["position_ids"] / longest)
    scale: Tensor = 1 + beta * torch.log(1 + steps)
    return scale[:, None, :, None]


MINISTRAL3 = dataclasses.replace(MISTRAL, query_scale=_scale_of_position)

# Experts are called as they are, in the place of the feed-forward block.
_EXPERTS: Any = dict(linear1=None, gate=None, activation=None, linear2=None, block="mlp")
MIXTRAL = dataclasses.replace(MISTRAL, **_EXPERTS, unless="mlp.jitter_noise")
QWEN2_MOE = dataclasses.replace(QWEN2, **_EXPERTS, hands_on=False)  # its masks alone have windows
QWEN3_MOE = dataclasses.replace(QWEN3, **_EXPERTS)
OLMOE = dataclasses.replace(
    QWEN3_MOE,
    norms_all_heads=True,
    window="config.sliding_window",
    unless="self_attn.config.clip_qkv",
)
GRANITEMOE = dataclasses.replace(GRANITE, **{**_EXPERTS, "block": "block_sparse_moe"})
ERNIE4_5_MOE = dataclasses.replace(HELIUM, **_EXPERTS)
FLEX_OLMO = dataclasses.replace(OLMO2, **_EXPERTS)
EXAONE_MOE = dataclasses.replace(QWEN3_MOE, window=EXAONE4.window, turns=EXAONE4.turns)
GLM4_MOE = dataclasses.replace(QWEN3_MOE, window=None)
MINIMAX_M2 = dataclasses.replace(GLM4_MOE, norms_all_heads=True)
GPT_OSS = dataclasses.replace(QWEN2, **_EXPERTS, sinks="sinks", angles="once")
COHERE = dataclasses.replace(
    HELIUM, norm2=None, parallel=True, angles="pairs", unless="self_attn.use_qk_norm"
)
COHERE2 = dataclasses.replace(
    COHERE,
    window="sliding_window",
    turns=lambda attention: attention.sliding_window is not None,
    unless=None,
)
