"""Tables of the families of transformers whose layers are fused, and which of them are packed.

A family is a line where it has BERT's children, and else a :class:`Form`; see CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fusedformer.fusion import _biases
from fusedformer.fusion._disentangled import Disentangled, WithBiases
from fusedformer.fusion._forms import Composed, Form, Model

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
# Those of models that take no registered attention.
SPLINTER = dataclasses.replace(BERT, scaling=None, is_causal=False, attends_itself=True)
TEXT_TOWER = dataclasses.replace(SPLINTER, scaling="scaling")
REMBERT = dataclasses.replace(SPLINTER, returns_tuple=True)
LAYOUTLMV3 = dataclasses.replace(SPLINTER, position_bias=_biases.bias_of_layoutlmv3)
MEGATRON_BERT = dataclasses.replace(REMBERT, norm1="attention.ln", norm2="ln", norms_first=True)
ROFORMER = dataclasses.replace(
    REMBERT, rotary="sinusoidal_pos", interleaved=True, unless="attention.self.rotary_value"
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

# Of images and sound.
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
DATA2VEC_VISION = dataclasses.replace(
    VIDEO_MAE,
    attention_dropout="attention.attention.dropout",
    dropout1="attention.output.dropout",
    scale1="lambda_1",
    scale2="lambda_2",
    depth="drop_path",
    position_bias=_biases.bias_of_data2vec_vision,
    scaling=None,
    is_causal=False,
    attends_itself=True,
    returns_tuple=True,
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


_LAYER = "encoder.layer"
BY_COLUMN, BY_TOKEN = Model(), Model(behind_padding=True)
T5_STACK = Model(has_distances=True, layers="block")
CAUSAL = Model(has_distances=True, masks_by_type=True, caches=True)
POOLED = Model(layers=_LAYER, composed=Composed(output="BaseModelOutputWithPooling"))
DISENTANGLED = Model(
    has_distances=True,
    layers=_LAYER,
    composed=Composed(
        embeds_mask="mask",
        distances="encoder.get_rel_embedding",
        conv="encoder.conv",
        unless="z_steps",
        output="BaseModelOutput",
    ),
)

# Modules of transformers, the names of their classes, and their models and layers.
_LIKE_BERT: tuple[tuple[str, str, Model, Form], ...] = (
    ("bert", "Bert", BY_COLUMN, BERT),
    ("roberta", "Roberta", BY_TOKEN, BERT),
    ("xlm_roberta", "XLMRoberta", BY_TOKEN, BERT),
    ("camembert", "Camembert", BY_TOKEN, BERT),
    ("electra", "Electra", BY_COLUMN, BERT),
    ("ernie", "Ernie", BY_COLUMN, BERT),
    ("roc_bert", "RoCBert", BY_COLUMN, BERT),
    ("layoutlm", "LayoutLM", Model(is_causal=False), BERT),
    ("roberta_prelayernorm", "RobertaPreLayerNorm", BY_TOKEN, PRE_NORM),
    ("xlm_roberta_xl", "XLMRobertaXL", BY_TOKEN, XLM_ROBERTA_XL),
    ("altclip", "AltRoberta", BY_TOKEN, BERT),
)
# The same of models whose layers are told of masks alone.
_COMPOSED: tuple[tuple[str, str, Model, Form], ...] = (
    (
        "mpnet",
        "MPNet",
        Model(
            behind_padding=True,
            has_distances=True,
            layers=_LAYER,
            composed=Composed(
                buckets="encoder.relative_attention_bias", output="BaseModelOutputWithPooling"
            ),
        ),
        MPNET,
    ),
    (
        "megatron_bert",
        "MegatronBert",
        Model(layers=_LAYER, composed=Composed(behind="encoder.ln")),
        MEGATRON_BERT,
    ),
    (
        "rembert",
        "RemBert",
        Model(layers=_LAYER, composed=Composed(before="encoder.embedding_hidden_mapping_in")),
        REMBERT,
    ),
    (
        "splinter",
        "Splinter",
        Model(layers=_LAYER, composed=Composed(output="BaseModelOutput")),
        SPLINTER,
    ),
    (
        "roformer",
        "RoFormer",
        Model(
            layers=_LAYER,
            composed=Composed(
                embeds=("input_ids", "token_type_ids", "inputs_embeds"),
                before="embeddings_project",
                angles="encoder.embed_positions",
                output="BaseModelOutputWithPastAndCrossAttentions",
            ),
        ),
        ROFORMER,
    ),
    ("align", "AlignText", POOLED, TEXT_TOWER),
    ("clap", "ClapText", dataclasses.replace(POOLED, behind_padding=True), TEXT_TOWER),
    ("deberta", "Deberta", DISENTANGLED, DEBERTA),
    ("deberta_v2", "DebertaV2", DISENTANGLED, DEBERTA_V2),
)
# The same of models that call their layers themselves.
_FLAT: tuple[tuple[str, str, Form], ...] = (
    ("nomic_bert", "NomicBert", NOMIC_BERT),
    ("gte", "Gte", GTE),
    ("jina_embeddings_v3", "JinaEmbeddingsV3", JINA),
)
# Towers of images, of sound, and of the texts beside them: nothing is packed, layers are fused.
_TOWERS: tuple[tuple[str, str, Form], ...] = (
    ("vit", "ViT", VIT),
    ("vit_mae", "ViTMAE", VIT),
    ("vit_msn", "ViTMSN", VIT),
    ("deit", "DeiT", VIT),
    ("ijepa", "IJepa", VIT),
    ("vivit", "Vivit", VIT),
    ("audio_spectrogram_transformer", "AST", VIT),
    ("dinov2", "Dinov2", DINOV2),
    ("dinov2_with_registers", "Dinov2WithRegisters", DINOV2),
    ("dinov3_vit", "DINOv3ViT", DINOV3),
    ("beit", "Beit", BEIT),
    ("clip", "CLIPEncoder", CLIP),
    ("altclip", "AltCLIPEncoder", CLIP),
    ("clipseg", "CLIPSegEncoder", CLIP),
    ("metaclip_2", "MetaClip2Encoder", CLIP),
    ("x_clip", "XCLIPEncoder", CLIP),
    ("owlvit", "OwlViTEncoder", CLIP),
    ("owlv2", "Owlv2Encoder", CLIP),
    ("chinese_clip", "ChineseCLIPVision", CLIP),
    ("idefics3", "Idefics3Encoder", CLIP),
    ("smolvlm", "SmolVLMEncoder", CLIP),
    ("siglip", "SiglipEncoder", CLIP),
    ("siglip2", "Siglip2Encoder", CLIP),
    ("videomae", "VideoMAE", VIDEO_MAE),
    ("swin", "Swin", SWIN),
    ("swinv2", "Swinv2", SWINV2),
    ("swin2sr", "Swin2SR", SWINV2),
    ("clap", "ClapAudio", DONUT_SWIN),
    ("whisper", "WhisperEncoder", WHISPER),
)
_LIKE_WAV2VEC2: tuple[tuple[str, str], ...] = (
    ("wav2vec2", "Wav2Vec2"),
    ("hubert", "Hubert"),
    ("unispeech", "UniSpeech"),
    ("unispeech_sat", "UniSpeechSat"),
)
_STABLE = "EncoderLayerStableLayerNorm"
TOWERS: dict[str, Form] = {
    **{f"{m}.modeling_{m}.{name}Layer": form for m, name, form in _TOWERS},
    **{f"{m}.modeling_{m}.{name}EncoderLayer": WAV2VEC2 for m, name in _LIKE_WAV2VEC2},
    **{f"{m}.modeling_{m}.{name}{_STABLE}": STABLE_WAV2VEC2 for m, name in _LIKE_WAV2VEC2},
    "data2vec.modeling_data2vec_audio.Data2VecAudioEncoderLayer": WAV2VEC2,
    "sew.modeling_sew.SEWEncoderLayer": WAV2VEC2,
    "wavlm.modeling_wavlm.WavLMEncoderLayer": WAVLM,
    f"wavlm.modeling_wavlm.WavLM{_STABLE}": dataclasses.replace(WAVLM, norms_first=True),
    "data2vec.modeling_data2vec_vision.Data2VecVisionLayer": DATA2VEC_VISION,
    "donut.modeling_donut_swin.DonutSwinLayer": DONUT_SWIN,
    "maskformer.modeling_maskformer_swin.MaskFormerSwinLayer": DONUT_SWIN,
}
_GENERATION = "bert_generation.modeling_bert_generation"
_DATA2VEC = "data2vec.modeling_data2vec_text.Data2VecText"
_GEMMA2 = "embedding_gemma2.modeling_embedding_gemma2.EmbeddingGemma2"
LAYERS: dict[str, Form] = {
    **TOWERS,
    **{f"{m}.modeling_{m}.{name}Layer": form for m, name, _, form in _LIKE_BERT},
    **{f"{m}.modeling_{m}.{name}Layer": form for m, name, form in _FLAT},
    **{f"{m}.modeling_{m}.{name}Layer": form for m, name, _, form in _COMPOSED},
    "esm.modeling_esm.EsmLayer": ESM,
    "esmc.modeling_esmc.EsmcLayer": ESMC,
    "xmod.modeling_xmod.XmodLayer": XMOD,
    "chinese_clip.modeling_chinese_clip.ChineseCLIPTextLayer": BERT,
    "t5.modeling_t5.T5Block": T5,
    "mt5.modeling_mt5.MT5Block": T5,
    "umt5.modeling_umt5.UMT5Block": UMT5,
    "eurobert.modeling_eurobert.EuroBertDecoderLayer": LLAMA,
    "qwen3.modeling_qwen3.Qwen3DecoderLayer": QWEN3,
    "gemma3.modeling_gemma3.Gemma3DecoderLayer": GEMMA3,
    f"{_GEMMA2}EncoderLayer": EMBEDDING_GEMMA2,
    f"{_DATA2VEC}Layer": BERT,
    "layoutlmv3.modeling_layoutlmv3.LayoutLMv3Layer": LAYOUTLMV3,
    f"{_GENERATION}.BertGenerationLayer": BERT,
    "distilbert.modeling_distilbert.TransformerBlock": DISTILBERT,
    "albert.modeling_albert.AlbertLayer": ALBERT,
    "modernbert.modeling_modernbert.ModernBertEncoderLayer": MODERNBERT,
}
ENCODERS = {
    *(f"{m}.modeling_{m}.{name}Encoder" for m, name, *_ in _LIKE_BERT),
    f"{_DATA2VEC}Encoder",
    f"{_GENERATION}.BertEncoder",
    "distilbert.modeling_distilbert.Transformer",
    "albert.modeling_albert.AlbertTransformer",
}
_SOUND = "Encoder", "EncoderStableLayerNorm"
SOUND = {
    *(f"{m}.modeling_{m}.{name}{kind}" for m, name in _LIKE_WAV2VEC2 for kind in _SOUND),
    "data2vec.modeling_data2vec_audio.Data2VecAudioEncoder",
}
MODELS: dict[str, Model] = {
    **{f"{m}.modeling_{m}.{name}Model": model for m, name, model, _ in _LIKE_BERT},
    **{f"{m}.modeling_{m}.{name}Model": BY_COLUMN for m, name, _ in _FLAT},
    **{f"{m}.modeling_{m}.{name}Model": model for m, name, model, _ in _COMPOSED},
    f"{_GEMMA2}TextModel": Model(has_distances=True, masks_by_type=True),
    f"{_DATA2VEC}Model": BY_TOKEN,
    f"{_GENERATION}.BertGenerationEncoder": BY_COLUMN,
    "distilbert.modeling_distilbert.DistilBertModel": BY_COLUMN,
    "albert.modeling_albert.AlbertModel": Model(pools_first_token=True),
    **{f"{m}.modeling_{m}.{m.upper()}Stack": T5_STACK for m in ("t5", "mt5", "umt5")},
    "eurobert.modeling_eurobert.EuroBertModel": BY_COLUMN,
    "qwen3.modeling_qwen3.Qwen3Model": CAUSAL,
    "gemma3.modeling_gemma3.Gemma3TextModel": CAUSAL,
    "esm.modeling_esm.EsmModel": Model(embeds_padded=True),
    "esmc.modeling_esmc.EsmcModel": Model(padded_by=("sequence_id",)),
    "chinese_clip.modeling_chinese_clip.ChineseCLIPTextModel": Model(first_is_read=True),
    "xmod.modeling_xmod.XmodModel": Model(behind_padding=True, of_sequences=("lang_ids",)),
    "modernbert.modeling_modernbert.ModernBertModel": Model(has_distances=True, masks_by_type=True),
}
