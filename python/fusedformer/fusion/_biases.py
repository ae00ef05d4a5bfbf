"""Biases that layers of transformers add to their scores, as ``position_bias`` of their forms.

Each function takes a layer and the arguments of its forward, from which it takes those that concern
the bias; it returns what is added to the scaled scores, or None. The last is of any layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def bias_of_beit(layer: Any, given: dict[str, Any]) -> Tensor | None:
    """Return the biases by the distance of patches, for an image's size."""
    resolution, interpolates = _of_image(given)
    if layer.relative_position_bias is None:
        return None
    return _by_patches(layer.relative_position_bias, layer, resolution, interpolates, given)


def bias_of_data2vec_vision(layer: Any, given: dict[str, Any]) -> Tensor | None:
    """Return the same, of the layer's own table and of that which all layers share."""
    resolution, interpolates = _of_image(given)
    shared: Tensor | None = given.pop("relative_position_bias", None)
    own = layer.attention.attention
    if not own.has_relative_position_bias:
        return shared
    bias = _by_patches(own.relative_position_bias, own.config, resolution, interpolates, given)
    return bias if shared is None else bias + shared


def bias_of_swin(layer: Any, given: dict[str, Any]) -> Tensor:
    """Return the biases ``[1, heads, tokens, tokens]`` of a window."""
    bias: Tensor = layer.attention.relative_position_bias()
    return bias


def bias_of_donut_swin(layer: Any, given: dict[str, Any]) -> Tensor:
    """Return the same, of a table within attention."""
    own = layer.attention.self
    return _of_window(own.relative_position_bias_table, own)


def bias_of_swinv2(layer: Any, given: dict[str, Any]) -> Tensor:
    """Return the same, of a table that a small network computes from distances."""
    own = layer.attention.self
    table = own.continuous_position_bias_mlp(own.relative_coords_table)
    return 16 * torch.sigmoid(_of_window(table.view(-1, own.num_attention_heads), own))


def bias_of_layoutlmv3(layer: Any, given: dict[str, Any]) -> Tensor | None:
    """Return the biases by the distances of tokens and of their boxes, scaled as scores are."""
    own = layer.attention.self
    by_position, by_box = given.pop("rel_pos", None), given.pop("rel_2d_pos", None)
    if not own.has_relative_attention_bias:
        return None
    bias: Tensor = by_position + by_box if own.has_spatial_attention_bias else by_position
    return bias / math.sqrt(own.attention_head_size)


def _of_image(given: dict[str, Any]) -> tuple[Any, bool]:
    return given.pop("resolution", None), given.pop("interpolate_pos_encoding", False)


def _by_patches(
    table: Any, settings: Any, resolution: Any, interpolates: bool, given: dict[str, Any]
) -> Tensor:
    """Call a module of biases as BEiT does, which ``settings`` tell the size of a patch."""
    patches = tuple(length // settings.patch_size for length in resolution)
    bias: Tensor = table(patches, interpolates, dim_size=given["hidden_states"].shape[1])
    return bias


def _of_window(table: Tensor, own: Any) -> Tensor:
    """Look up the biases ``[1, heads, tokens, tokens]`` of all pairs of a window's tokens."""
    tokens = math.prod(own.window_size)
    pairs = table[own.relative_position_index.view(-1)]
    return pairs.view(tokens, tokens, -1).permute(2, 0, 1)[None]


def dense_biases(table: Tensor, length: int) -> Tensor:
    """Return biases ``[1, heads, length, length]`` of a table by distance."""
    reach = table.shape[1] // 2
    distances = torch.arange(1 - length, length, device=table.device).clamp(-reach, reach)
    rows = table[:, reach + distances].unfold(1, length, 1)  # of the last query first
    return rows.flip(1)[None]
