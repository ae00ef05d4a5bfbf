"""A small random model of any type that transformers has, by rules, and inputs for it.

A type's default configuration is made small by the names of its numbers; where that does not build
or run, the next of :data:`VARIANTS` is tried. Nothing is downloaded, and nothing large is built:
a model is given up while it is made, at its first parameter above the limit.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CONFIG_MAPPING_NAMES: dict[str, str] = vars(configuration_auto)["CONFIG_MAPPING_NAMES"]
MOST_PARAMETERS = 3_000_000
VOCABULARY, LENGTHS, LENGTH = 256, (11, 6, 8), 11


class Variant(NamedTuple):
    """The sizes that a configuration gets."""

    width: int = 32
    heads: int = 4
    image: int = 32
    patch: int = 8
    same_head_dim: bool = False


VARIANTS = (
    Variant(), Variant(image=64, patch=16), Variant(64, image=64, patch=4),
    Variant(image=64, patch=16, same_head_dim=True), Variant(64, 2), Variant(image=128, patch=4),
)  # fmt: skip


class TooLargeError(Exception):
    """The configuration could not be made small."""


# ---- configurations


def _few(n: int) -> Any:
    return lambda value, v: min(value, n)


def _width(value: int, v: Variant) -> int:
    return v.width


# The first that matches decides; a rule gives None for what stays.
RULES: tuple[tuple[str, Any], ...] = (
    (r".*token_ids?|.*_token_index|.*_token|num_feat_extract_layers|query_dim|num_feature_levels"
     r"|(num|in|input|audio|num_input|model_in)_channels|num_mel_bins|n_mels|mel_dim|in_chans"
     r"|dim_bbox|.*_kernel_size|d_conv|.*_stride|.*_ratio",
     lambda value, v: None),
    (r"num_kv_shared_layers|hidden_size_per_layer_input", lambda value, v: 0),
    (r"base_channels|num_filters|n_filters", _few(8)),
    (r"upsample_initial_channel|.*_units", _few(32)),
    (r"rotary_dim", lambda value, v: v.width // v.heads),
    (r"window_size", lambda value, v: min(value, 4)),
    (r"(.*_)?vocab_size.*|num_embeddings|codebook_size", lambda value, v: VOCABULARY),
    (r"mamba_(n|num)_heads|n_mamba_heads|linear_num_(key|value)_heads|mamba_num_heads", _few(8)),
    (r"(mamba_)?(d_head|head_?dim|headdim)|d_kv|dim_head|.*head_dim|.*attention_head_size",
     lambda value, v: None if v.same_head_dim else v.width // v.heads),
    (r".*(num_key_value_heads|num_kv_heads|kv_n_heads|num_key_value_attention_heads).*",
     lambda value, v: value if value < 3 else 2),
    (r"(.*_)?(num_(attention_|self_attention_|cross_attention_)?heads|n_heads?|attention_heads"
     r"|num_attn_heads|heads)(_.*)?", lambda value, v: min(value, v.heads)),
    (r".*(intermediate|ffn|ff|mlp|feed_?forward)_?(size|dim|hidden_size|embed_dim).*|d_ff|n_inner"
     r"|mlp_hidden.*|dim_feedforward.*|.*_dim_feedforward",
     lambda value, v: v.width + v.width // 2),
    (r"num_experts_per_tok|top_?k(_experts)?|moe_top_?k|moe_k|num_selected_experts", _few(2)),
    (r"n_group|topk_group|num_expert_groups?", _few(1)),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_moe_experts", _few(4)),
    (r"(num_hidden_|num_|n_|encoder_|decoder_|.*_)?layers?|n_layer|(.*_)?depth|num_blocks"
     r"|num_(encoder|decoder|hidden)_layers|.*num_(hidden_)?layers|num_self_attends_per_block",
     _few(2)),
    (r"max_(.*_)?(position_embeddings|positions|seq_len|sequence_length|seq_length)|n_positions"
     r"|n_ctx|context_length|max_pos_emb|.*_max_position_embeddings|block_size",
     lambda value, v: min(value, 64)),
    (r"(.*_)?(image|img|input|crop)_size|pretrain_image_size", lambda value, v: v.image),
    (r"(.*_)?patch_size", lambda value, v: min(value, v.patch)),
    (r"mamba_d_state|state_size|ssm_state_size|(mamba_)?d_state|qk_rope_head_dim|d_rel", _few(8)),
    (r"(.*_)?lora_rank|time_step_rank|embedding_rank|adapter_rank", _few(16)),
    (r"num_conv_pos_embeddings", _few(15)),
    (r"num_conv_pos_embedding_groups|num_codevector_groups|num_groups|n_groups", _few(2)),
    (r"index_topk|.*num_queries|num_query_tokens|num_latents|mem_len|chunk_size"
     r"|num_detection_tokens|num_denoising|.*num_landmarks|segment_means_seq_len", _few(8)),
    (r"(sliding|local|attention)_?(window|attention)(_size)?|local_radius|global_block_size",
     _few(4)),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_dim|emb_dim|dim|width"
     r"|embedding_size|model_dim|embed_dims|embeddings_size|projection_dim|dim_model|lru_width"
     r"|channels|latent_channels|base_channels|projection_size|output_size|d_embed|units"
     r"|filters|pooler_output_size|inplanes|out_dim|out_features|hidden_channels|feature_size"
     r"|visual_feat_dim|output_dim|classifier_proj_size|proj_codevector_dim|codevector_dim"
     r"|features?_dim|latents|hidden_size_.*|num_pos_feats|transformer_width)(_.*)?", _width),
)  # fmt: skip
LISTS = (
    (r".*depths?|.*layers_per_stage|blocks_per_stage|stage_num_blocks|num_layers|layers"
     r"|stage_numb_of_layers|num_block_repeats|block_sizes", lambda value, v: min(value, 2)),
    (r".*(hidden_sizes?|embed_dims?|channels?|conv_dim|tdnn_dim|dims?|widths?|embed_dim_per_stage"
     r"|filters|channel_list|units)(_.*)?",
     lambda value, v: value if value < 8 else max(8, value // 8)),
)  # fmt: skip


def small_config(config: Any, variant: Variant, special: dict[int, int]) -> Any:
    """Of the same class as ``config``; ``special`` collects where token ids went."""
    cls, changes = type(config), {}
    defaults = {name: getattr(cls, name, None) for name in vars(config)}
    in_lists = any(
        isinstance(vars(config).get(n), (list, tuple)) for n in ("num_heads", "num_attention_heads")
    )
    for name, value in vars(config).items():
        if name.startswith("_") or isinstance(value, bool) or value is None:
            continue
        if isinstance(value, PreTrainedConfig):
            changes[name] = small_config(value, variant, special)
        elif isinstance(value, int):
            new = _small(RULES, name, value, variant)
            if re.fullmatch(r".*(token_ids?|_token_index|_id|_index)", name):
                new = (
                    special.setdefault(value, VOCABULARY - 1 - len(special) % 100)
                    if (value >= VOCABULARY - 30)
                    else None
                )
            if in_lists and name in ("embed_dim", "hidden_size"):
                new = max(8, value // 8)
            if new is not None and new != value:
                changes[name] = new
            elif value != defaults.get(name):
                changes[name] = value
        elif isinstance(value, (list, tuple)) and value and all(type(x) is int for x in value):
            if defaults.get(name) is None and name in ("layer_types",):
                continue
            if re.fullmatch(r".*token_ids?", name):
                ids = (special.setdefault(x, VOCABULARY - 1 - len(special)) for x in value)
                changes[name] = [*ids]
                continue
            if re.fullmatch(r"(.*_)?(image|img|input)_size|window_size|(.*_)?patch_size", name):
                found = [_small(RULES, name, x, variant) for x in value]
            else:
                found = [_small(LISTS, name, x, variant) for x in value]
            if None not in found:
                changes[name] = type(value)(found)
            elif defaults.get(name) is not None and value != defaults[name]:
                changes[name] = value
        elif (
            isinstance(value, (str, float))
            and value != defaults.get(name)
            and name not in ("transformers_version", "model_type", "dtype")
        ):
            changes[name] = value
    kv, all_heads = (vars(config).get(f"num_{n}heads") for n in ("key_value_", "attention_"))
    if kv is not None and kv == all_heads:
        changes["num_key_value_heads"] = changes.get("num_attention_heads", all_heads)
    types = vars(config).get("layer_types")
    layers = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in vars(config)),
                  None)  # fmt: skip
    if types and layers and isinstance(vars(config)[layers], int):
        kinds = list(dict.fromkeys(types))
        kinds = kinds * 2 if len(kinds) == 1 else kinds
        changes[layers] = len(kinds)
        for name, value in vars(config).items():
            if isinstance(value, list) and len(value) == len(types):
                changes[name] = value[: len(kinds)]
        changes["layer_types"] = kinds
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        if isinstance(rope, dict):
            changes[name] = _small_rope(rope, variant, config)
    changes.update(CHANGES.get(getattr(cls, "model_type", ""), {}))
    return cls(**changes)


def _small(rules: Any, name: str, value: int, variant: Variant) -> int | None:
    for pattern, rule in rules:
        if re.fullmatch(pattern, name):
            return rule(value, variant)
    return None


def _small_rope(rope: Any, variant: Variant, config: Any) -> Any:
    if isinstance(rope, dict):
        found = {key: _small_rope(value, variant, config) for key, value in rope.items()}
        if "rope_theta" in rope:
            found["rope_theta"] = rope["rope_theta"] or 1e4
        if "rope_type" in rope and _speaks_of("mrope_section", config):
            half = (variant.width // variant.heads) // 2
            found["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        return found
    return rope


def _speaks_of(word: str, config: Any) -> bool:
    return word in inspect.getsource(_modeling(type(config)))


def _modeling(config: Any) -> Any:
    """The module of models beside that of the configuration."""
    return importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))


# What the rules get wrong, by model type.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "dac": {"encoder_hidden_size": 8},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "mamba2": {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "hidden_size": 32},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip


# ---- models


def types() -> list[str]:
    """All model types of the installed transformers."""
    return sorted(CONFIG_MAPPING_NAMES)


def model_class(model_type: str) -> Any:
    """The base model of a type; else the first of its module that takes its configuration."""
    config = CONFIG_MAPPING[model_type]
    for mapping in (modeling_auto.MODEL_MAPPING, *_OTHER_MAPPINGS):
        if config in mapping:
            found = mapping[config]
            return found[0] if isinstance(found, (tuple, list)) else found
    for cls in vars(_modeling(config)).values():
        if inspect.isclass(cls) and issubclass(cls, PreTrainedModel):
            taken = vars(cls).get("config_class", inspect.get_annotations(cls).get("config"))
            if taken in (config, config.__name__) and not cls.__name__.endswith("PreTrainedModel"):
                return cls
    raise LookupError("no model class takes its configuration")


_OTHER_MAPPINGS = [
    value for name, value in vars(modeling_auto).items()
    if re.fullmatch(r"MODEL_.*MAPPING", name) and name != "MODEL_MAPPING"
]  # fmt: skip


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    total = 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal total
        total += 0 if parameter is None else parameter.numel()
        if total > MOST_PARAMETERS:
            raise TooLargeError(f"more than {MOST_PARAMETERS:,} parameters")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def small_model(model_type: str, variant: Variant = VARIANTS[0]) -> Any:
    """In evaluation mode, with weights that make its outputs anything but constant."""
    config = small_config(CONFIG_MAPPING[model_type](), variant, {})
    torch.manual_seed(0)
    with _limited():
        model = model_class(model_type)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter.numel() // max(1, len(parameter)) if parameter.dim() > 1 else 100
            spread = max(1, fan) ** -0.5
            parameter.add_(spread * torch.randn_like(parameter))
    return model


# ---- inputs


def inputs_of(model: Any, kind: int = 0) -> dict[str, Tensor]:
    """For the model's forward, drawn by name; the last tokens of rows are padding."""
    signature = inspect.signature(type(model).forward).parameters
    draw = torch.Generator().manual_seed(1)
    shape, config = (len(LENGTHS), LENGTH), model.config
    found: dict[str, Tensor] = {}
    main = model.main_input_name
    wanted = {
        name for name, p in signature.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name != "self"
    } | {n for n in ((main,) if isinstance(main, str) else main) if n in signature}  # fmt: skip
    if "input_ids" in signature:
        wanted.add("input_ids")
    if "pixel_values" in signature and kind != 1:
        wanted.add("pixel_values")
    for name in ("decoder_input_ids", "attention_mask", "bbox"):
        if name in signature:
            wanted.add(name)
    wanted -= {"kwargs"}
    for name in sorted(wanted):
        found[name] = _drawn(name, config, shape, draw, kind)
    if "grid_thw" in found:
        _lay_out_patches(found, main, config, draw)
    if "spatial_shapes" in signature and "pixel_values" in found:
        _lay_out_shapes(found, config, draw)
    if "attention_mask" in found and "input_ids" not in found and "inputs_embeds" not in found:
        del found["attention_mask"]
    return found


def _lay_out_patches(found: dict[str, Any], main: str, config: Any, draw: Any) -> None:
    """Images of two sizes as rows of patches, as vision towers take them."""
    merge = _number(config, ("spatial_merge_size",), 2)
    found["grid_thw"] = torch.tensor([[1, 2 * merge, 2 * merge], [1, 2 * merge, 4 * merge]])
    patch = _number(config, ("patch_size",), 8)
    each = _number(config, ("in_channels", "num_channels"), 3) * patch * patch
    each *= _number(config, ("temporal_patch_size",), 1)
    name = next(n for n in ("hidden_states", "pixel_values", main) if n in found)
    found[name] = torch.randn(int(found["grid_thw"].prod(1).sum()), each, generator=draw)


def _lay_out_shapes(found: dict[str, Any], config: Any, draw: Any) -> None:
    """Images of up to 4 x 4 patches, as rows of which smaller images leave some empty."""
    shapes = torch.tensor([[4, 4], [2, 4], [3, 2]])
    each = _number(config, ("num_channels",), 3) * _number(config, ("patch_size",), 8) ** 2
    found["spatial_shapes"] = shapes
    found["pixel_attention_mask"] = (torch.arange(16) < shapes.prod(1, keepdim=True)).long()
    found["pixel_values"] = torch.randn(3, 16, each, generator=draw)


def padded(inputs: dict[str, Any], side: str) -> dict[str, Any]:
    """The same rows, shorter, with padding to their ``right``, ``left``, or in the ``middle``."""
    rows, length = inputs["input_ids"].shape
    mask = torch.zeros(rows, length, dtype=torch.long)
    for row, cut in enumerate(length - LENGTH + n for n in LENGTHS):
        end = length if side == "left" else cut if side == "right" else length - 3
        mask[row, end - cut if side == "left" else 0 : end] = 1
        if side == "middle":  # three real tokens behind the hole
            mask[row, cut - 3 : length - 3], mask[row, length - 3 :] = 0, 1
    found = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == mask.shape:
            found[name] = value[:, -1:].expand_as(value).clone()
            for row in range(rows):
                real = mask[row].bool()
                found[name][row, real] = value[row, : int(real.sum())]
    return {**found, "attention_mask": mask}


def runnable(model_type: str, recipe: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    """The model, and inputs that its forward takes, with as many tokens as it has features."""
    model = small_model(model_type, VARIANTS[recipe[0]])
    inputs = inputs_of(model, recipe[1])
    for _ in range(4):
        try:
            with torch.no_grad():
                model(**inputs)
            return model, inputs
        except ValueError as error:
            told = re.search(r"tokens:? (\d+),? features:? (\d+)", str(error))
            if told is None or "input_ids" not in inputs:
                raise
            inputs = _with_features(model, inputs, int(told[1]), int(told[2]))
    raise LookupError("its features can't be placed")


def _with_features(model: Any, inputs: dict[str, Any], tokens: int, features: int) -> Any:
    rows = inputs["input_ids"].shape[0]
    if tokens:
        raise LookupError("its features can't be placed")
    each = features // rows
    config = model.config
    token = next(
        getattr(config, n) for n in ("image_token_id", "image_token_index", "audio_token_id",
                                     "audio_token_index") if hasattr(config, n)
    )  # fmt: skip
    if not 0 < each < 200:
        raise LookupError(f"{each} features a row")
    ids = torch.cat([torch.full((rows, each), token), inputs["input_ids"]], 1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _ids(config: Any, shape: Any, draw: torch.Generator) -> Tensor:
    taken: set[int] = set()
    sizes: list[int] = []

    def walk(config: Any) -> None:
        for name, value in vars(config).items():
            if isinstance(value, PreTrainedConfig):
                walk(value)
            elif re.fullmatch(r".*(token_ids?|token_index|_id|_index)", name):
                taken.update([value] if isinstance(value, int) else value or [])
            elif re.fullmatch(r"(.*_)?vocab_size", name) and isinstance(value, int):
                sizes.append(value)

    walk(config)
    free = torch.tensor([i for i in range(3, min(sizes, default=30)) if i not in taken][:100])
    return free[torch.randint(len(free), shape, generator=draw)]


def _image_size(config: Any) -> int:
    for name in ("image_size", "img_size", "input_size", "crop_size", "pretrain_image_size"):
        value = getattr(config, name, None)
        if value is not None:
            return value if isinstance(value, int) else next(iter(value))
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            size = _image_size(value)
            if size:
                return size
    return 0


def _number(config: Any, names: tuple[str, ...], default: int) -> int:
    for name in names:
        if isinstance(vars(config).get(name), int):
            return vars(config)[name]
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            found = _number(value, names, 0)
            if found:
                return found
    return default


def _drawn(name: str, config: Any, shape: Any, draw: torch.Generator, kind: int) -> Tensor:
    rows = shape[0]
    if name == "attention_mask":
        return torch.ones(shape, dtype=torch.long)
    if name in ("input_ids", "text_input_ids"):
        return _ids(config, shape, draw)
    if name == "decoder_input_ids":
        return _ids(config, (rows, 6), draw)
    if name == "bbox":
        corner = torch.randint(0, 20, (*shape, 2), generator=draw)
        return torch.cat([corner, corner + 5], -1)
    if name in ("grid_thw", "spatial_shapes", "pixel_attention_mask"):
        return torch.ones(2, 3, dtype=torch.long)  # laid out with its patches
    if name == "past_values":
        length = _number(config, ("context_length",), 32)
        channels = _number(config, ("num_input_channels",), 1)
        return torch.randn(rows, length, channels, generator=draw)
    if name in ("pixel_values", "pixel_values_videos"):
        size = _image_size(config) or 64
        channels = _number(config, ("num_channels", "in_channels", "in_chans"), 3)
        frames = _number(config, ("num_frames", "frames_per_clip"), 0)
        frames = frames or kind // 2
        shape = (rows, frames, channels, size, size) if frames else (rows, channels, size, size)
        return torch.randn(shape, generator=draw)
    if name in ("input_values", "audio_values"):
        if kind == 1:
            spectrum = _number(config, ("max_length",), 64), _number(config, ("num_mel_bins",), 80)
            return torch.randn(rows, *spectrum, generator=draw)
        shape = (rows, 1600) if kind == 0 else (rows, 1, 1600)
        return torch.randn(shape, generator=draw)
    if name in ("input_features", "audio_features"):
        bins = _number(config, ("num_mel_bins", "n_mels", "feature_projection_input_dim",
                                "input_feat_per_channel", "input_dim"), 80)  # fmt: skip
        time = 2 * _number(config, ("max_source_positions",), 16)
        shape = [(rows, bins, time), (rows, time, bins), (rows, 1, time, bins)][kind]
        return torch.randn(shape, generator=draw)
    if name in ("inputs_embeds", "hidden_states", "encoder_hidden_states"):
        width = _number(config, ("hidden_size", "d_model", "embed_dim"), 32)
        return torch.randn(*shape, width, generator=draw)
    raise LookupError(f"no rule for the argument {name!r}")
