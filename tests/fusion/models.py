"""Small models of transformers by random configurations, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
T: Any = transformers

SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
)  # fmt: skip
TEXT = dict(**SIZES, vocab_size=99, max_position_embeddings=40)
IMAGE = dict(**SIZES, image_size=16, patch_size=4)
TOKENS = dict(bos_token_id=97, eos_token_id=98, pad_token_id=1)
MODERN = dict(
    global_attn_every_n_layers=2, local_attention=6, cls_token_id=1, sep_token_id=2, **TOKENS
)
SHAPES = dict(
    pronunciation_vocab_size=9, pronunciation_embed_dim=4, shape_vocab_size=9, shape_embed_dim=4,
)  # fmt: skip
LAYOUT: dict[str, Any] = dict(
    pad_token_id=1, max_2d_position_embeddings=64, coordinate_size=6, shape_size=4, rel_pos_bins=8,
    max_rel_pos=12, rel_2d_pos_bins=8, max_rel_2d_pos=40, input_size=16, patch_size=8,
)  # fmt: skip
ESM: dict[str, Any] = dict(
    pad_token_id=1, mask_token_id=7, token_dropout=True, position_embedding_type="rotary",
    emb_layer_norm_before=True,
)  # fmt: skip
XMOD: dict[str, Any] = dict(languages=["en_XX", "de_DE"], default_language="de_DE")
EUROBERT: dict[str, Any] = dict(num_key_value_heads=2, mask_token_id=3, **TOKENS)
QWEN3: dict[str, Any] = dict(num_key_value_heads=2, head_dim=8, **TOKENS)
DECODER: dict[str, Any] = dict(**TEXT, num_key_value_heads=2, **TOKENS)
GEMMA3: dict[str, Any] = dict(
    num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4,
    use_bidirectional_attention=True, layer_types=["sliding_attention", "full_attention"], **TOKENS,
)  # fmt: skip
GEMMA2: dict[str, Any] = dict(
    TEXT, num_key_value_heads=2, head_dim=8, sliding_window=4, hidden_size_per_layer_input=8,
    layer_types=["sliding_attention", "full_attention"], embedding_dim=32, global_head_dim=16,
    num_global_key_value_heads=1, **TOKENS,
)  # fmt: skip
T5GEMMA: dict[str, Any] = dict(
    TEXT, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
    layer_types=["sliding_attention", "full_attention"], **TOKENS,
)  # fmt: skip
T5 = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0)
DEBERTA = dict(
    relative_attention=True,
    position_buckets=8,
    max_relative_positions=12,
    share_att_key=True,
    pos_att_type="p2c|c2p",
    norm_rel_ebd="layer_norm",
    position_biased_input=False,
    type_vocab_size=0,
)
GPT2: dict[str, Any] = dict(
    vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2,
    use_cache=False,
)  # fmt: skip
BART = dict(
    vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40,
)  # fmt: skip
WHISPER: dict[str, Any] = dict(
    BART, num_mel_bins=6, max_source_positions=8, max_target_positions=12, bos_token_id=1,
    eos_token_id=2, pad_token_id=0, decoder_start_token_id=1,
)  # fmt: skip
SOUND: dict[str, Any] = dict(
    conv_dim=[8, 8], conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, apply_spec_augment=False, layerdrop=0.0,
)  # fmt: skip
# Stages of 7 x 7 and 4 x 4 patches: windows are padded, and shifted in the first.
WINDOWS: dict[str, Any] = dict(
    image_size=28, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4,
    mlp_ratio=1.5, drop_path_rate=0.0,
)  # fmt: skip
# Experts by loops, as only these run in float64.
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
    experts_implementation="eager",
)  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: T.BertModel(T.BertConfig(**TEXT)),
    "bert, pre-training": lambda: T.BertForPreTraining(T.BertConfig(**TEXT, hidden_act="gelu_new")),
    "roberta": lambda: T.RobertaModel(T.RobertaConfig(**TEXT)),
    "xlm-roberta": lambda: T.XLMRobertaModel(T.XLMRobertaConfig(**TEXT)),
    "camembert": lambda: T.CamembertModel(T.CamembertConfig(**TEXT)),
    "electra": lambda: T.ElectraModel(T.ElectraConfig(**TEXT, embedding_size=16)),
    "distilbert": lambda: T.DistilBertModel(
        T.DistilBertConfig(
            vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40
        )
    ),
    "albert": lambda: T.AlbertModel(T.AlbertConfig(**TEXT, embedding_size=16)),
    "modernbert": lambda: T.ModernBertModel(T.ModernBertConfig(**TEXT, **MODERN)),
    "ernie": lambda: T.ErnieModel(T.ErnieConfig(**TEXT, use_task_id=True)),
    "data2vec-text": lambda: T.Data2VecTextModel(T.Data2VecTextConfig(**TEXT)),
    "roc-bert": lambda: T.RoCBertModel(T.RoCBertConfig(**TEXT, **SHAPES)),
    "layoutlm": lambda: T.LayoutLMModel(T.LayoutLMConfig(**TEXT, max_2d_position_embeddings=64)),
    "layoutlmv3": lambda: T.LayoutLMv3Model(
        T.LayoutLMv3Config(**TEXT, **LAYOUT, has_spatial_attention_bias=True)
    ),
    "roberta-prelayernorm": lambda: T.RobertaPreLayerNormModel(T.RobertaPreLayerNormConfig(**TEXT)),
    "xlm-roberta-xl": lambda: T.XLMRobertaXLModel(T.XLMRobertaXLConfig(**TEXT)),
    "bert-generation": lambda: T.BertGenerationEncoder(T.BertGenerationConfig(**TEXT)),
    "nomic-bert": lambda: T.NomicBertModel(T.NomicBertConfig(**TEXT), add_pooling_layer=True),
    "gte": lambda: T.GteModel(T.GteConfig(**TEXT)),
    "jina-v3": lambda: T.JinaEmbeddingsV3Model(T.JinaEmbeddingsV3Config(**TEXT)),
    "markuplm": lambda: T.MarkupLMModel(
        T.MarkupLMConfig(
            **TEXT,
            max_depth=5,
            max_xpath_tag_unit_embeddings=9,
            max_xpath_subs_unit_embeddings=9,
            xpath_unit_hidden_size=4,
            tag_pad_id=8,
            subs_pad_id=8,
        )
    ),
    "esm": lambda: T.EsmModel(T.EsmConfig(**TEXT, **ESM)),
    "embedding-gemma2": lambda: T.EmbeddingGemma2TextModel(T.EmbeddingGemma2TextConfig(**GEMMA2)),
    "chinese-clip text": lambda: T.ChineseCLIPTextModel(T.ChineseCLIPTextConfig(**TEXT)),
    "altclip text": lambda: T.models.altclip.modeling_altclip.AltRobertaModel(
        T.AltCLIPTextConfig(**TEXT)
    ),
    "align text": lambda: T.AlignTextModel(T.AlignTextConfig(**TEXT)),
    "clap text": lambda: T.ClapTextModel(T.ClapTextConfig(**TEXT)),
    "clip text": lambda: T.CLIPTextModel(T.CLIPTextConfig(**TEXT, **TOKENS)),
    "flava text": lambda: T.FlavaTextModel(T.FlavaTextConfig(**TEXT)),
    "esmc": lambda: T.EsmcModel(T.EsmcConfig(**TEXT, pad_token_id=1)),
    "xmod": lambda: T.XmodModel(T.XmodConfig(**TEXT, **XMOD)),
    "xmod, norms first": lambda: T.XmodModel(
        T.XmodConfig(**TEXT, **XMOD, pre_norm=True, ln_before_adapter=False)
    ),
    "mpnet": lambda: T.MPNetModel(T.MPNetConfig(**TEXT)),
    "megatron-bert": lambda: T.MegatronBertModel(T.MegatronBertConfig(**TEXT)),
    "rembert": lambda: T.RemBertModel(T.RemBertConfig(**TEXT, input_embedding_size=16)),
    "splinter": lambda: T.SplinterModel(T.SplinterConfig(**TEXT, question_token_id=3)),
    "roformer": lambda: T.RoFormerModel(T.RoFormerConfig(**TEXT, embedding_size=16)),
    "eurobert": lambda: T.EuroBertModel(T.EuroBertConfig(**TEXT, **EUROBERT)),
    "qwen3": lambda: T.Qwen3Model(T.Qwen3Config(**TEXT, **QWEN3)),
    "gemma3": lambda: T.Gemma3TextModel(T.Gemma3TextConfig(**TEXT, **GEMMA3)),
    "llama": lambda: T.LlamaModel(T.LlamaConfig(**DECODER, attention_bias=True)),
    "mistral": lambda: T.MistralModel(T.MistralConfig(**DECODER, sliding_window=4)),
    "gemma2": lambda: T.Gemma2Model(
        T.Gemma2Config(
            **DECODER,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            attn_logit_softcapping=2.0,
        )
    ),
    "phi3": lambda: T.Phi3Model(T.Phi3Config(**DECODER, sliding_window=4)),
    "olmo2": lambda: T.Olmo2Model(T.Olmo2Config(**DECODER)),
    "granite": lambda: T.GraniteModel(
        T.GraniteConfig(
            **DECODER, residual_multiplier=0.4, embedding_multiplier=2.0, attention_multiplier=0.7
        )
    ),
    "phi": lambda: T.PhiModel(T.PhiConfig(**DECODER, partial_rotary_factor=0.5)),
    "cohere": lambda: T.CohereModel(T.CohereConfig(**DECODER)),
    "gpt-oss": lambda: T.GptOssModel(
        T.GptOssConfig(**DECODER, **EXPERTS, head_dim=8, sliding_window=4)
    ),
    "t5": lambda: T.T5EncoderModel(T.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "umt5": lambda: T.UMT5EncoderModel(T.UMT5Config(**T5, feed_forward_proj="relu")),
    "t5gemma": lambda: T.T5GemmaEncoderModel(
        T.T5GemmaConfig(encoder=T5GEMMA, decoder=T5GEMMA, is_encoder_decoder=False)
    ),
    "t5gemma2": lambda: T.models.t5gemma2.modeling_t5gemma2.T5Gemma2TextEncoder(
        T.models.t5gemma2.configuration_t5gemma2.T5Gemma2TextConfig(**T5GEMMA, dropout_rate=0.0)
    ),
    "deberta-v3": lambda: T.DebertaV2Model(T.DebertaV2Config(**TEXT, **DEBERTA)),
    "deberta-v2": lambda: T.DebertaV2Model(
        T.DebertaV2Config(
            **TEXT,
            relative_attention=True,
            max_relative_positions=6,
            pos_att_type="c2p|p2c",
            conv_kernel_size=3,
            type_vocab_size=2,
        )
    ),
    "deberta": lambda: T.DebertaModel(
        T.DebertaConfig(
            **TEXT,
            relative_attention=True,
            pos_att_type="c2p|p2c",
            position_biased_input=False,
            type_vocab_size=2,
            layer_norm_eps=1e-3,
        )
    ),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)),
    "bart": lambda: T.BartModel(T.BartConfig(**BART)),
    "clip": lambda: T.CLIPModel(
        T.CLIPConfig(text_config={**TEXT, **TOKENS}, vision_config=IMAGE, **TOKENS)
    ),
    "siglip": lambda: T.SiglipModel(
        T.SiglipConfig(text_config={**TEXT, **TOKENS}, vision_config=IMAGE)
    ),
    "siglip2": lambda: T.Siglip2Model(
        T.Siglip2Config(
            text_config={**TEXT, **TOKENS},
            vision_config={**SIZES, "num_patches": 16, "patch_size": 4},
        )
    ),
    "vit": lambda: T.ViTModel(T.ViTConfig(**IMAGE)),
    "deit": lambda: T.DeiTModel(T.DeiTConfig(**IMAGE)),
    "dinov2": lambda: T.Dinov2Model(T.Dinov2Config(**IMAGE)),
    "dinov2-registers": lambda: T.Dinov2WithRegistersModel(
        T.Dinov2WithRegistersConfig(**IMAGE, use_swiglu_ffn=True)
    ),
    "dinov3": lambda: T.DINOv3ViTModel(
        T.DINOv3ViTConfig(**IMAGE, num_register_tokens=2, pos_embed_rescale=None)
    ),
    "beit": lambda: T.BeitModel(
        T.BeitConfig(**IMAGE, use_relative_position_bias=True, drop_path_rate=0.0)
    ),
    "yolos": lambda: T.YolosModel(T.YolosConfig(**{**IMAGE, "image_size": [16, 16]})),
    "blip vision": lambda: T.BlipVisionModel(T.BlipVisionConfig(**IMAGE)),
    "blip-2 vision": lambda: T.Blip2VisionModel(T.Blip2VisionConfig(**IMAGE)),
    "janus vision": lambda: T.JanusVisionModel(T.JanusVisionConfig(**IMAGE)),
    "internvl vision": lambda: T.InternVLVisionModel(
        T.InternVLVisionConfig(
            **{**IMAGE, "image_size": [16, 16], "patch_size": [4, 4]},
            use_qk_norm=True,
            norm_type="rms_norm",
        )
    ),
    "mlcd": lambda: T.MLCDVisionModel(T.MLCDVisionConfig(**IMAGE, num_key_value_groups=1)),
    "aimv2 vision": lambda: T.Aimv2VisionModel(T.Aimv2VisionConfig(**IMAGE, use_head=False)),
    "data2vec-vision": lambda: T.Data2VecVisionModel(
        T.Data2VecVisionConfig(
            **IMAGE,
            use_relative_position_bias=True,
            use_shared_relative_position_bias=True,
            drop_path_rate=0.0,
        )
    ),
    "swin": lambda: T.SwinModel(T.SwinConfig(**WINDOWS)),
    "swinv2": lambda: T.Swinv2Model(T.Swinv2Config(**WINDOWS)),
    "swin2sr": lambda: T.Swin2SRModel(
        T.Swin2SRConfig(**{**WINDOWS, "image_size": 8, "patch_size": 1})
    ),
    "donut-swin": lambda: T.DonutSwinModel(T.DonutSwinConfig(**WINDOWS)),
    "videomae": lambda: T.VideoMAEModel(T.VideoMAEConfig(**IMAGE, num_frames=2)),
    "timesformer": lambda: T.TimesformerModel(T.TimesformerConfig(**IMAGE, num_frames=2)),
    "timesformer, joint": lambda: T.TimesformerModel(
        T.TimesformerConfig(**IMAGE, num_frames=2, attention_type="joint_space_time")
    ),
    "whisper": lambda: T.WhisperModel(T.WhisperConfig(**WHISPER)),
    "wav2vec2": lambda: T.Wav2Vec2Model(T.Wav2Vec2Config(**SIZES, **SOUND)),
    "wavlm": lambda: T.WavLMModel(
        T.WavLMConfig(**SIZES, **SOUND, num_buckets=8, max_bucket_distance=20)
    ),
    "wavlm, norms first": lambda: T.WavLMModel(
        T.WavLMConfig(
            **SIZES, **SOUND, num_buckets=8, do_stable_layer_norm=True, feat_extract_norm="layer"
        )
    ),
    "data2vec-audio": lambda: T.Data2VecAudioModel(T.Data2VecAudioConfig(**SIZES, **SOUND)),
    "hubert": lambda: T.HubertModel(
        T.HubertConfig(**SIZES, **SOUND, do_stable_layer_norm=True, feat_extract_norm="layer")
    ),
}
PACKED = {
    "bert", "bert, pre-training", "roberta", "xlm-roberta", "camembert", "electra", "distilbert",
    "albert", "modernbert", "ernie", "data2vec-text", "roc-bert", "layoutlm",
    "roberta-prelayernorm", "xlm-roberta-xl", "bert-generation", "nomic-bert", "gte", "jina-v3",
    "embedding-gemma2", "chinese-clip text", "altclip text", "align text", "clap text",
    "esm", "esmc", "xmod", "xmod, norms first", "mpnet", "megatron-bert", "rembert", "splinter",
    "roformer", "eurobert", "qwen3", "gemma3", "t5", "umt5", "deberta-v3", "deberta-v2", "deberta",
    "layoutlmv3", "clip text", "flava text", "t5gemma", "t5gemma2",
    "llama", "mistral", "gemma2", "phi3", "olmo2", "granite", "phi", "gpt2",
    "cohere", "gpt-oss", "markuplm",
}  # fmt: skip
DUAL = {"clip", "siglip", "siglip2"}
TOWERS = {*DUAL, "vit", "deit", "dinov2", "dinov2-registers", "beit"}
TOWERS |= {"dinov3", "videomae", "whisper", "data2vec-vision", "yolos", "blip vision"}
TOWERS |= {"mlcd", "blip-2 vision", "janus vision", "internvl vision", "aimv2 vision"}
SOUNDS = {"wav2vec2", "hubert", "data2vec-audio", "wavlm", "wavlm, norms first"}
WINDOWED = {"swin", "swinv2", "swin2sr", "donut-swin"}
TOWERS |= SOUNDS | WINDOWED
LENGTHS = (11, 4, 7)  # of texts, and of sounds in frames
MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def perturbed(model: Any, seed: int | None = None) -> Any:
    """``model`` with weights at which attention is not uniform; those of new models are small."""
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def model_of(name: str, seed: int = 0) -> Any:
    """Without dropout, and with weights of a size at which attention is not uniform."""
    torch.manual_seed(seed)
    model = perturbed(MODELS[name]())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("attention_dropout", "dropout"):  # some keep the number
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def inputs_of(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = len(LENGTHS), max(LENGTHS)
    pixels = {"pixel_values": torch.randn(len(LENGTHS), 3, 16, 16, generator=generator)}
    text = {
        "input_ids": torch.randint(3, 97, shape, generator=generator),
        "attention_mask": MASK.long(),
    }
    if name == "whisper":
        ids = torch.randint(3, 97, (3, 6), generator=generator)
        features = torch.randn(3, 6, 16, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    if name in SOUNDS:
        samples = 10 * torch.tensor(LENGTHS) + 10
        mask = torch.arange(int(samples.max())) < samples[:, None]
        sound = torch.randn(mask.shape, generator=generator)
        return {"input_values": sound * mask, "attention_mask": mask.long()}
    if name in WINDOWED:
        side = 8 if name == "swin2sr" else 28
        return {"pixel_values": torch.randn(3, 3, side, side, generator=generator)}
    if name == "videomae" or name.startswith("timesformer"):
        return {"pixel_values": torch.randn(3, 2, 3, 16, 16, generator=generator)}
    if name == "siglip2":  # rows of patches
        pixels = {
            "pixel_values": torch.randn(3, 16, 48, generator=generator),
            "pixel_attention_mask": (torch.arange(16) < torch.tensor([[16], [12], [8]])).long(),
            "spatial_shapes": torch.tensor([[4, 4], [3, 4], [2, 4]]),
        }
    if name in TOWERS - DUAL:
        return pixels
    if name in TOWERS or name == "clip text":  # pooled at the token that ends the text
        text["input_ids"][range(len(LENGTHS)), [n - 1 for n in LENGTHS]] = 98
        return {**pixels, **text} if name in TOWERS else text
    if name == "roc-bert":
        for kind in ("shape", "pronunciation"):
            text[f"input_{kind}_ids"] = torch.randint(0, 9, shape, generator=generator)
    if name == "markuplm":
        for kind in ("tags", "subs"):
            text[f"xpath_{kind}_seq"] = torch.randint(0, 8, (*shape, 5), generator=generator)
    if name == "xmod":
        text["lang_ids"] = torch.tensor([1, 0, 1])
    if name.startswith("layoutlm"):
        text["bbox"] = torch.randint(0, 60, (*shape, 2), generator=generator).repeat(1, 1, 2)
        text["bbox"][..., 2:] += 3
    if name == "bart":
        return {**text, "decoder_input_ids": torch.randint(3, 97, (3, 6), generator=generator)}
    return text


def run(model: Any, inputs: dict[str, Tensor], seed: int = 2) -> dict[str, Tensor]:
    """Outputs, of real tokens alone, and the gradients of all parameters that have one."""
    outputs = {}
    for key, value in model(**inputs).items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            of_tokens = value.dim() == 3 and value.shape[:2] == MASK.shape
            outputs[key] = value[MASK.to(value.device)] if of_tokens else value
    generator = torch.Generator().manual_seed(seed)
    dys = [torch.randn(o.shape, generator=generator).to(o) for o in outputs.values()]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(
        list(outputs.values()), list(parameters.values()), dys, allow_unused=True
    )
    found = {f"grad of {n}": g for n, g in zip(parameters, grads, strict=True) if g is not None}
    return {**outputs, **found}
