"""Describe the layers of towers of images and sound: where each family keeps what."""

from __future__ import annotations

import dataclasses
from typing import Any

from fusedformer.fusion import _biases
from fusedformer.fusion._forms import Form
from fusedformer.fusion._text_forms import BERT

VIT = Form(
    attention="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    norm1="layernorm_before",
    norm2="layernorm_after",
    linear1="mlp.fc1",
    activation="mlp.activation_fn",
    linear2="mlp.fc2",
    attention_dropout="attention.attention_dropout",
    dropout1="dropout",
    dropout2="dropout",
    norms_first=True,
    head_dim="head_dim",
)
CLIP = Form(
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    norm1="layer_norm1",
    norm2="layer_norm2",
    linear1="mlp.fc1",
    activation="mlp.activation_fn",
    linear2="mlp.fc2",
    attention_dropout="self_attn.dropout",
    norms_first=True,
    head_dim="head_dim",
    scaling="scale",
)
SIGLIP = dataclasses.replace(CLIP, hands_on=False)
MLCD = dataclasses.replace(CLIP, rotary="position_embeddings", learned_angles=True)
JANUS = dataclasses.replace(
    CLIP,
    out="self_attn.projection_layer",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    attention_dropout="self_attn.attention_dropout",
    dropout1="self_attn.projection_dropout",
    hidden_dropout="mlp.dropout1",
    dropout2="mlp.dropout2",
)
BLIP2 = dataclasses.replace(
    CLIP,
    query="self_attn.qkv",
    key=None,
    value=None,
    out="self_attn.projection",
    attention_dropout="self_attn.attention_dropout",
    mask=None,
)
BLIP = dataclasses.replace(
    BLIP2, attention_dropout="self_attn.dropout", is_causal=False, attends_itself=True
)
GIT = dataclasses.replace(CLIP, is_causal=False, attends_itself=True)
DINOV2 = dataclasses.replace(
    VIT,
    norm1="norm1",
    norm2="norm2",
    linear1="mlp.fc1|up_proj",
    gate="mlp.gate_proj",
    activation="mlp.activation_fn|act_fn",
    linear2="mlp.fc2|down_proj",
    dropout1=None,
    dropout2=None,
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
    depth="drop_path",
)
DINOV3 = dataclasses.replace(
    DINOV2,
    linear1="mlp.up_proj",
    activation="mlp.act_fn",
    linear2="mlp.down_proj",
    attention_dropout="attention.dropout",
    rotary="position_embeddings",
    rotary_last=True,
)
PIXIO = dataclasses.replace(VIT, depth="drop_path")
INTERNVL = dataclasses.replace(
    VIT,
    out="attention.projection_layer",
    dropout1="attention.projection_dropout",
    query_norm="attention.q_norm",
    key_norm="attention.k_norm",
    norms_all_heads=True,
    scale1="lambda_1",
    scale2="lambda_2",
    scaling="scale",
    mask=None,
)
EOMT = dataclasses.replace(
    DINOV2, out="attention.out_proj", attention_dropout="attention.dropout", scaling="scale"
)
AIMV2 = dataclasses.replace(
    EOMT,
    norm1="rms_norm1",
    norm2="rms_norm2",
    linear1="ffn.up_proj",
    gate="ffn.gate_proj",
    activation="ffn.act_fn",
    linear2="ffn.down_proj",
    scale1=None,
    scale2=None,
    depth=None,
    hands_on=False,
)
BEIT = dataclasses.replace(
    VIT,
    scale1="lambda_1",
    scale2="lambda_2",
    depth="drop_path",
    position_bias=_biases.bias_of_beit,
)
VIDEO_MAE = dataclasses.replace(
    BERT,
    attention="attention.attention",
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    norm1="layernorm_before",
    norm2="layernorm_after",
    attention_dropout="attention.attention.dropout_prob",
    norms_first=True,
    mask=None,
)
YOLOS = dataclasses.replace(VIDEO_MAE, dropout1="attention.output.dropout")
VITPOSE = dataclasses.replace(
    YOLOS,
    linear1="mlp.fc1",
    activation="mlp.activation",
    linear2="mlp.fc2",
    dropout2=None,
    unless="mlp.experts",
)
VILT = dataclasses.replace(
    YOLOS,
    attention_dropout="attention.attention.dropout",
    mask="attention_mask",
    scaling=None,
    is_causal=False,
    attends_itself=True,
    returns_tuple=True,
)
TIMESFORMER = dataclasses.replace(
    VILT,
    query="attention.attention.qkv",
    key=None,
    value=None,
    attention_dropout="attention.attention.attn_drop",
    hidden_dropout="intermediate.dropout",
    depth="drop_path",
    mask=None,
    is_divided=True,
)


def _configured(attention: Any) -> float | None:
    """Return the probability of data2vec's attention by ``sdpa``, whose dropout is never called."""
    is_called = "Sdpa" not in type(attention).__name__
    return None if is_called else attention.config.attention_probs_dropout_prob


DATA2VEC_VISION = dataclasses.replace(
    VILT,
    drops_by=_configured,
    scale1="lambda_1",
    scale2="lambda_2",
    depth="drop_path",
    position_bias=_biases.bias_of_data2vec_vision,
    mask=None,
)
# Of images whose tokens attend within windows.
SWIN = dataclasses.replace(
    VIT,
    depth="drop_path",
    depth_of_attention=True,
    position_bias=_biases.bias_of_swin,
    mask=None,
    is_windowed=True,
    returns_weights=True,
)
DONUT_SWIN = dataclasses.replace(
    BERT,
    norm1="layernorm_before",
    norm2="layernorm_after",
    depth="drop_path",
    depth_of_attention=True,
    position_bias=_biases.bias_of_donut_swin,
    mask=None,
    norms_first=True,
    scaling=None,
    is_windowed=True,
    attends_itself=True,
)
SWINV2 = dataclasses.replace(
    DONUT_SWIN,
    norm1=None,
    norm2=None,
    out_norm="layernorm_before",
    block_norm="layernorm_after",
    logit_scale="attention.self.logit_scale",
    depth_of_attention=False,
    position_bias=_biases.bias_of_swinv2,
)
WHISPER = dataclasses.replace(
    CLIP,
    norm1="self_attn_layer_norm",
    norm2="final_layer_norm",
    linear1="fc1",
    activation="activation_fn",
    linear2="fc2",
    dropout1="dropout",
    hidden_dropout="activation_dropout",
    dropout2="dropout",
    scaling="scaling",
    clamps_half=True,
)
GLMASR = dataclasses.replace(
    WHISPER,
    out="self_attn.o_proj",
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    linear1="mlp.fc1",
    activation="mlp.act_fn",
    linear2="mlp.fc2",
    attention_dropout="self_attn.attention_dropout",
    dropout1=None,
    hidden_dropout=None,
    dropout2=None,
    rotary="position_embeddings",
    mask=None,
    clamps_half=False,
)
WAV2VEC2 = Form(
    attention="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.out_proj",
    norm1="layer_norm",
    norm2="final_layer_norm",
    linear1="feed_forward.intermediate_dense",
    activation="feed_forward.intermediate_act_fn",
    linear2="feed_forward.output_dense",
    attention_dropout="attention.dropout",
    dropout1="dropout",
    hidden_dropout="feed_forward.intermediate_dropout",
    dropout2="feed_forward.output_dropout",
    head_dim="head_dim",
)
STABLE_WAV2VEC2 = dataclasses.replace(WAV2VEC2, norms_first=True, unless="adapter_layer")
WAVLM = dataclasses.replace(
    WAV2VEC2,
    buckets="attention.rel_attn_embed",
    max_distance="max_distance",
    gates_bias=True,
    is_causal=False,
    attends_itself=True,
)
# Of images of any size, whose patches are rows of one sequence.
PATCH_ROWS = Form(
    attention="attn",
    query="attn.qkv",
    out="attn.proj",
    norm1="norm1",
    norm2="norm2",
    linear1="mlp.fc1|linear_fc1",
    activation="mlp.act|activation_fn|act_fn",
    linear2="mlp.fc2|linear_fc2",
    attention_dropout="attn.attention_dropout",
    query_norm="attn.q_norm",
    key_norm="attn.k_norm",
    mask=None,
    bounds="cu_seqlens",
    norms_first=True,
    rotary="position_embeddings",
    head_dim="head_dim",
    is_causal=False,
)
GATED_ROWS = dataclasses.replace(
    PATCH_ROWS,
    linear1="mlp.up_proj",
    gate="mlp.gate_proj",
    activation="mlp.act_fn",
    linear2="mlp.down_proj",
)
CLIP_ROWS = dataclasses.replace(
    CLIP,
    attention_dropout="self_attn.attention_dropout",
    mask=None,
    bounds="cu_seqlens",
    rotary="position_embeddings",
    scaling="scaling",
    is_causal=False,
)
# The same of sound.
WHISPER_ROWS = dataclasses.replace(
    WHISPER,
    attention_dropout="self_attn.attention_dropout",
    dropout1=None,
    hidden_dropout=None,
    dropout2=None,
    mask=None,
    bounds="cu_seqlens",
    is_causal=False,
    returns_tuple=True,
)
PIXTRAL = dataclasses.replace(
    VIT,
    norm1="attention_norm",
    norm2="ffn_norm",
    linear1="feed_forward.up_proj",
    gate="feed_forward.gate_proj",
    activation="feed_forward.act_fn",
    linear2="feed_forward.down_proj",
    attention_dropout="attention.dropout",
    dropout1=None,
    dropout2=None,
    rotary="position_embeddings",
)
