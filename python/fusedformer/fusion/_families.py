"""Tables of the families of transformers whose layers are fused, and which of them are packed.

A family is a line where it has BERT's children, and else a form in ``_text_forms.py``,
``_decoder_forms.py`` or ``_tower_forms.py``; see CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses

from fusedformer.fusion import _ends, _positions
from fusedformer.fusion._decoder_forms import (
    APERTUS,
    ARCEE,
    BIOGPT,
    COHERE,
    COHERE2,
    EMU3,
    ERNIE4_5_MOE,
    EXAONE4,
    EXAONE_MOE,
    FLEX_OLMO,
    GEMMA2,
    GLM,
    GLM4,
    GLM4_MOE,
    GLM4V,
    GLM_IMAGE,
    GPT2,
    GPT_BIGCODE,
    GPT_NEOX,
    GPT_OSS,
    GRANITE,
    GRANITEMOE,
    HELIUM,
    HYPERCLOVAX,
    MINIMAX_M2,
    MINISTRAL3,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    OLMO3,
    OLMOE,
    OPT,
    PERSIMMON,
    PHI,
    PHI3,
    QWEN2,
    QWEN2_MOE,
    QWEN3_MOE,
    SEED_OSS,
    SMOLLM3,
    STABLELM,
    STARCODER2,
    VAULTGEMMA,
)
from fusedformer.fusion._forms import Composed, Form, Model, Tower
from fusedformer.fusion._text_forms import (
    ALBERT,
    BERT,
    DEBERTA,
    DEBERTA_V2,
    DISTILBERT,
    EMBEDDING_GEMMA2,
    ESM,
    ESMC,
    GEMMA3,
    GTE,
    JINA,
    LAYOUTLM,
    LAYOUTLMV3,
    LLAMA,
    MEGATRON_BERT,
    MODERNBERT,
    MPNET,
    NOMIC_BERT,
    PRE_NORM,
    QWEN3,
    REMBERT,
    ROFORMER,
    SPLINTER,
    T5,
    T5GEMMA,
    T5GEMMA2,
    TEXT_TOWER,
    UMT5,
    XLM_ROBERTA_XL,
    XMOD,
)
from fusedformer.fusion._tower_families import LIKE_WAV2VEC2, TOWERS
from fusedformer.fusion._tower_forms import WHISPER

_LAYER = "encoder.layer"
BY_COLUMN, BY_TOKEN = Model(), Model(behind_padding=True)
T5_STACK = Model(has_distances=True, layers="block")
T5GEMMA_STACK = Model(has_distances=True, masks_by_type=True, layers="layers")
CAUSAL = Model(caches=True, masks_causally=True, masks_by_positions=True)
_BY_COLUMN_ALONE = dataclasses.replace(CAUSAL, masks_by_positions=False)
CAUSAL_IN_WINDOWS = dataclasses.replace(CAUSAL, has_distances=True)
CAUSAL_BY_TYPE = dataclasses.replace(CAUSAL_IN_WINDOWS, masks_by_type=True)
_BY_TYPE_ALONE = dataclasses.replace(CAUSAL_BY_TYPE, masks_by_positions=False)
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

_EMBEDS = Composed().embeds

# Modules of transformers, the names of their classes, and their models and layers.
_LIKE_BERT: tuple[tuple[str, str, Model, Form], ...] = (
    ("bert", "Bert", BY_COLUMN, BERT),
    ("roberta", "Roberta", BY_TOKEN, BERT),
    ("xlm_roberta", "XLMRoberta", BY_TOKEN, BERT),
    ("camembert", "Camembert", BY_TOKEN, BERT),
    ("electra", "Electra", BY_COLUMN, BERT),
    ("ernie", "Ernie", BY_COLUMN, BERT),
    ("roc_bert", "RoCBert", BY_COLUMN, BERT),
    ("layoutlm", "LayoutLM", Model(is_causal=False), LAYOUTLM),
    ("roberta_prelayernorm", "RobertaPreLayerNorm", BY_TOKEN, PRE_NORM),
    ("xlm_roberta_xl", "XLMRobertaXL", BY_TOKEN, XLM_ROBERTA_XL),
    ("altclip", "AltRoberta", BY_TOKEN, LAYOUTLM),
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
    (
        "markuplm",
        "MarkupLM",
        Model(
            behind_padding=True,
            layers=_LAYER,
            composed=Composed(
                embeds=(*_EMBEDS, "xpath_tags_seq", "xpath_subs_seq"),
                output="BaseModelOutputWithPooling",
            ),
        ),
        TEXT_TOWER,
    ),
    ("deberta", "Deberta", DISENTANGLED, DEBERTA),
    ("deberta_v2", "DebertaV2", DISENTANGLED, DEBERTA_V2),
)
# The same of models that call their layers themselves.
_FLAT: tuple[tuple[str, str, Form], ...] = (
    ("nomic_bert", "NomicBert", NOMIC_BERT),
    ("gte", "Gte", GTE),
    ("jina_embeddings_v3", "JinaEmbeddingsV3", JINA),
)
# Encoders of sequence-to-sequence models: their layers are Whisper's, or have the norms last.
_BART = dataclasses.replace(WHISPER, norms_first=False)
_BY_IDS, _BY_SHAPE, _BY_TOKENS = (
    Model(positions=one) for one in (_positions.of_ids, _positions.of_shape, _positions.of_tokens)
)
_SEQ2SEQ: tuple[tuple[str, str, Model, Form], ...] = (
    ("bart", "Bart", _BY_IDS, _BART),
    ("plbart", "PLBart", _BY_IDS, _BART),
    ("mbart", "MBart", _BY_IDS, WHISPER),
    ("blenderbot", "Blenderbot", _BY_SHAPE, WHISPER),
    ("blenderbot_small", "BlenderbotSmall", _BY_SHAPE, _BART),
    ("marian", "Marian", _BY_SHAPE, _BART),
    ("pegasus", "Pegasus", _BY_SHAPE, WHISPER),
    ("m2m_100", "M2M100", _BY_TOKENS, WHISPER),
)
# Towers of text beside those of images, with CLIP's layers.
_AT_END = Model(tower=Tower(end=_ends.end))
_AT_LARGEST = Model(tower=Tower(end=_ends.largest))
_AT_LAST = Model(layers="encoder.layers", tower=Tower(end=_ends.last, is_causal=False, head="head"))
_TEXT_TOWERS: dict[str, Model] = {
    "aimv2.modeling_aimv2.Aimv2TextModel": Model(
        layers="encoder.layers", tower=Tower(end=_ends.first_end, norm="rms_norm", if_padded=True)
    ),
    "tipsv2.modeling_tipsv2.Tipsv2TextModel": Model(
        layers="encoder.layers", tower=Tower(end=None, is_causal=False)
    ),
    "clip.modeling_clip.CLIPTextModel": _AT_END,
    "clipseg.modeling_clipseg.CLIPSegTextModel": _AT_END,
    "x_clip.modeling_x_clip.XCLIPTextModel": _AT_END,
    "metaclip_2.modeling_metaclip_2.MetaClip2TextModel": Model(tower=Tower(end=_ends.first_end)),
    "owlvit.modeling_owlvit.OwlViTTextTransformer": _AT_LARGEST,
    "owlv2.modeling_owlv2.Owlv2TextTransformer": _AT_LARGEST,
    "siglip.modeling_siglip.SiglipTextModel": _AT_LAST,
    "siglip2.modeling_siglip2.Siglip2TextModel": _AT_LAST,
}
# The same of language models.
_CAUSAL: tuple[tuple[str, str, Model, Form], ...] = (
    ("llama", "Llama", CAUSAL, LLAMA),
    ("mistral", "Mistral", CAUSAL_IN_WINDOWS, MISTRAL),
    ("ministral3", "Ministral3", CAUSAL_IN_WINDOWS, MINISTRAL3),
    ("qwen2", "Qwen2", CAUSAL_BY_TYPE, QWEN2),
    ("qwen3", "Qwen3", CAUSAL_BY_TYPE, QWEN3),
    ("gemma", "Gemma", CAUSAL, LLAMA),
    ("gemma2", "Gemma2", CAUSAL_BY_TYPE, GEMMA2),
    ("granite", "Granite", CAUSAL, GRANITE),
    ("hyperclovax", "HyperCLOVAX", CAUSAL, HYPERCLOVAX),
    ("smollm3", "SmolLM3", CAUSAL_BY_TYPE, SMOLLM3),
    ("olmo2", "Olmo2", CAUSAL, OLMO2),
    ("olmo3", "Olmo3", CAUSAL_BY_TYPE, OLMO3),
    ("exaone4", "Exaone4", CAUSAL_BY_TYPE, EXAONE4),
    ("cwm", "Cwm", CAUSAL_BY_TYPE, QWEN2),
    ("seed_oss", "SeedOss", CAUSAL, SEED_OSS),
    ("arcee", "Arcee", CAUSAL, ARCEE),
    ("apertus", "Apertus", CAUSAL, APERTUS),
    ("starcoder2", "Starcoder2", CAUSAL_IN_WINDOWS, STARCODER2),
    ("phi3", "Phi3", CAUSAL_IN_WINDOWS, PHI3),
    ("phi", "Phi", CAUSAL, PHI),
    ("stablelm", "StableLm", dataclasses.replace(CAUSAL, layers="layers"), STABLELM),
    ("helium", "Helium", CAUSAL, HELIUM),
    ("ernie4_5", "Ernie4_5", CAUSAL, HELIUM),
    ("glm", "Glm", CAUSAL, GLM),
    ("glm4", "Glm4", CAUSAL, GLM4),
    ("jais2", "Jais2", CAUSAL, ARCEE),
    ("vaultgemma", "VaultGemma", CAUSAL_BY_TYPE, VAULTGEMMA),
    ("persimmon", "Persimmon", CAUSAL, PERSIMMON),
    ("biogpt", "BioGpt", _BY_COLUMN_ALONE, BIOGPT),
    ("qwen3_vl", "Qwen3VLText", CAUSAL, QWEN3),
    ("glm4v", "Glm4vText", _BY_COLUMN_ALONE, GLM4V),
    ("glm_ocr", "GlmOcrText", _BY_COLUMN_ALONE, GLM4V),
    ("glm_image", "GlmImageText", _BY_COLUMN_ALONE, GLM_IMAGE),
    ("granite_docling", "GraniteDoclingText", CAUSAL, GRANITE),
    ("granite4_vision", "Granite4VisionText", CAUSAL, GRANITE),
    ("cohere", "Cohere", CAUSAL, COHERE),
    ("cohere2", "Cohere2", CAUSAL_BY_TYPE, COHERE2),
    ("mixtral", "Mixtral", CAUSAL_IN_WINDOWS, MIXTRAL),
    (
        "qwen2_moe",
        "Qwen2Moe",
        dataclasses.replace(CAUSAL_BY_TYPE, layers="layers"),
        QWEN2_MOE,
    ),
    ("qwen3_moe", "Qwen3Moe", CAUSAL_IN_WINDOWS, QWEN3_MOE),
    ("qwen3_vl_moe", "Qwen3VLMoeText", CAUSAL, GLM4_MOE),
    ("olmoe", "Olmoe", CAUSAL_IN_WINDOWS, OLMOE),
    ("flex_olmo", "FlexOlmo", CAUSAL, FLEX_OLMO),
    ("granitemoe", "GraniteMoe", CAUSAL, GRANITEMOE),
    ("ernie4_5_moe", "Ernie4_5_Moe", CAUSAL, ERNIE4_5_MOE),
    ("exaone_moe", "ExaoneMoe", CAUSAL_BY_TYPE, EXAONE_MOE),
    ("glm4_moe", "Glm4Moe", CAUSAL, GLM4_MOE),
    ("solar_open", "SolarOpen", CAUSAL, GLM4_MOE),
    ("minimax_m2", "MiniMaxM2", CAUSAL, MINIMAX_M2),
    ("dots1", "Dots1", CAUSAL_BY_TYPE, QWEN3_MOE),
    ("gpt_oss", "GptOss", _BY_TYPE_ALONE, GPT_OSS),
)
# The same with other names of layers and models.
_CAUSAL_BY_NAMES: tuple[tuple[str, str, str, Model, Form], ...] = (
    ("gpt2", "GPT2Block", "GPT2Model", CAUSAL, GPT2),
    ("gpt_bigcode", "GPTBigCodeBlock", "GPTBigCodeModel", CAUSAL, GPT_BIGCODE),
    ("gpt_neox", "GPTNeoXLayer", "GPTNeoXModel", CAUSAL, GPT_NEOX),
    (
        "opt",
        "OPTDecoderLayer",
        "OPTDecoder",
        dataclasses.replace(_BY_COLUMN_ALONE, counts_real=True),
        OPT,
    ),
    ("paddleocr_vl", "PaddleOCRDecoderLayer", "PaddleOCRTextModel", _BY_COLUMN_ALONE, QWEN2),
    ("emu3", "Emu3DecoderLayer", "Emu3TextModel", CAUSAL, EMU3),
    ("qwen2_vl", "Qwen2VLDecoderLayer", "Qwen2VLTextModel", _BY_TYPE_ALONE, QWEN2),
    ("qwen2_5_vl", "Qwen2_5_VLDecoderLayer", "Qwen2_5_VLTextModel", _BY_TYPE_ALONE, QWEN2),
)
_GENERATION = "bert_generation.modeling_bert_generation"
_DATA2VEC = "data2vec.modeling_data2vec_text.Data2VecText"
_GEMMA2 = "embedding_gemma2.modeling_embedding_gemma2.EmbeddingGemma2"
LAYERS: dict[str, Form] = {
    **TOWERS,
    **{f"{m}.modeling_{m}.{name}Layer": form for m, name, _, form in _LIKE_BERT},
    **{f"{m}.modeling_{m}.{name}Layer": form for m, name, form in _FLAT},
    **{f"{m}.modeling_{m}.{name}Layer": form for m, name, _, form in _COMPOSED},
    **{f"{m}.modeling_{m}.{name}EncoderLayer": form for m, name, _, form in _SEQ2SEQ},
    "esm.modeling_esm.EsmLayer": ESM,
    "esmc.modeling_esmc.EsmcLayer": ESMC,
    "xmod.modeling_xmod.XmodLayer": XMOD,
    "chinese_clip.modeling_chinese_clip.ChineseCLIPTextLayer": LAYOUTLM,
    "t5.modeling_t5.T5Block": T5,
    "mt5.modeling_mt5.MT5Block": T5,
    "umt5.modeling_umt5.UMT5Block": UMT5,
    "t5gemma.modeling_t5gemma.T5GemmaEncoderLayer": T5GEMMA,
    "t5gemma2.modeling_t5gemma2.T5Gemma2EncoderLayer": T5GEMMA2,
    "eurobert.modeling_eurobert.EuroBertDecoderLayer": LLAMA,
    **{f"{m}.modeling_{m}.{name}DecoderLayer": form for m, name, _, form in _CAUSAL},
    **{f"{m}.modeling_{m}.{layer}": form for m, layer, _, _, form in _CAUSAL_BY_NAMES},
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
# Encoders that only call their layers, and where they keep them: of images smaller ones leave
# patches empty, and texts are padded before images join them.
STACKS = {
    "siglip2.modeling_siglip2.Siglip2Encoder": "layers",
    "idefics2.modeling_idefics2.Idefics2Encoder": "layers",
    "idefics3.modeling_idefics3.Idefics3Encoder": "layers",
    "smolvlm.modeling_smolvlm.SmolVLMEncoder": "layers",
    "vilt.modeling_vilt.ViltEncoder": "layer",
    "visual_bert.modeling_visual_bert.VisualBertEncoder": "layer",
    "flava.modeling_flava.FlavaEncoder": "layer",
}
# Those whose models have a connector that mixes patches with empty ones, so that none are.
MIXED = {
    "idefics3.modeling_idefics3.Idefics3Encoder",
    "smolvlm.modeling_smolvlm.SmolVLMEncoder",
}
_SOUND = "Encoder", "EncoderStableLayerNorm"
SOUND = {
    *(f"{m}.modeling_{m}.{name}{kind}" for m, name in LIKE_WAV2VEC2 for kind in _SOUND),
    "data2vec.modeling_data2vec_audio.Data2VecAudioEncoder",
}
GATED_SOUND = {f"wavlm.modeling_wavlm.WavLM{kind}" for kind in _SOUND}
POOLED_SOUND = {  # and what they return
    "qwen2_audio.modeling_qwen2_audio.Qwen2AudioEncoder": "BaseModelOutput",
    "audioflamingo3.modeling_audioflamingo3.AudioFlamingo3Encoder": "BaseModelOutputWithPooling",
}
MODELS: dict[str, Model] = {
    **_TEXT_TOWERS,
    **{f"{m}.modeling_{m}.{name}Model": model for m, name, model, _ in _LIKE_BERT},
    **{f"{m}.modeling_{m}.{name}Model": BY_COLUMN for m, name, _ in _FLAT},
    **{f"{m}.modeling_{m}.{name}Model": model for m, name, model, _ in _COMPOSED},
    **{f"{m}.modeling_{m}.{name}Encoder": model for m, name, model, _ in _SEQ2SEQ},
    "flava.modeling_flava.FlavaTextModel": Model(
        layers=_LAYER,
        composed=Composed(
            embeds=("input_ids", "token_type_ids", "position_ids"),
            last="layernorm",
            output="BaseModelOutputWithPooling",
        ),
    ),
    f"{_GEMMA2}TextModel": Model(has_distances=True, masks_by_type=True),
    f"{_DATA2VEC}Model": BY_TOKEN,
    f"{_GENERATION}.BertGenerationEncoder": BY_COLUMN,
    "distilbert.modeling_distilbert.DistilBertModel": BY_COLUMN,
    "albert.modeling_albert.AlbertModel": Model(pools_first_token=True),
    **{f"{m}.modeling_{m}.{m.upper()}Stack": T5_STACK for m in ("t5", "mt5", "umt5")},
    "t5gemma.modeling_t5gemma.T5GemmaEncoder": T5GEMMA_STACK,
    "t5gemma2.modeling_t5gemma2.T5Gemma2TextEncoder": T5GEMMA_STACK,
    "eurobert.modeling_eurobert.EuroBertModel": BY_COLUMN,
    **{f"{m}.modeling_{m}.{name}Model": model for m, name, model, _ in _CAUSAL},
    **{f"{m}.modeling_{m}.{name}": model for m, _, name, model, _ in _CAUSAL_BY_NAMES},
    "gemma3.modeling_gemma3.Gemma3TextModel": dataclasses.replace(
        CAUSAL_BY_TYPE, full_by="use_bidirectional_attention"
    ),
    "esm.modeling_esm.EsmModel": Model(embeds_padded=True),
    "esmc.modeling_esmc.EsmcModel": Model(padded_by=("sequence_id",)),
    "chinese_clip.modeling_chinese_clip.ChineseCLIPTextModel": Model(first_is_read=True),
    "xmod.modeling_xmod.XmodModel": Model(behind_padding=True, of_sequences=("lang_ids",)),
    "modernbert.modeling_modernbert.ModernBertModel": Model(has_distances=True, masks_by_type=True),
}
