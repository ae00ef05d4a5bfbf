"""Define embeddings with their norm and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer.reference.norm import dropped, layer_norm


def embedding_layer_norm(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    padding_idx: int | None = None,
    p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Compute ``dropout(layer_norm(weight[input] + position_weight[...] + ...))``.

    The third term is ``token_type_weight[...]``; without ids all types are 0. The row
    ``padding_idx`` of ``weight`` has no gradient.
    """
    total = weight[input.long()]
    if padding_idx is not None:
        is_padding = (input == padding_idx % weight.shape[0])[..., None]
        total = torch.where(is_padding, total.detach(), total)
    if position_weight is not None and position_ids is not None:
        total = total + position_weight[position_ids.long()]
    if token_type_weight is not None:
        types = torch.zeros_like(input) if token_type_ids is None else token_type_ids
        total = total + token_type_weight[types.long()]
    return dropped(layer_norm(total, weight.shape[1:], norm_weight, norm_bias, eps), p, keep)
