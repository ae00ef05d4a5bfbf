"""Scaled dot-product attention: the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedformer.reference.norm import dropped
from fusedformer.reference.softmax import masked, normalized


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``dropout(softmax(scale * query @ key.T + mask)) @ value``, and the log-sum-exp.

    In the letters of the products: queries l, keys s, head dim d, value head dim e.

    Args:
        query: ``[*batch, heads, l, d]``; leading dimensions broadcast, and may be fewer.
        key: ``[*batch, heads, s, d]``.
        value: ``[*batch, heads, s, e]``.
        attn_mask: boolean (True = keep) or floating-point (added), broadcast to ``[..., l, s]``.
        dropout_p: probability with which ``keep`` was drawn.
        is_causal: key s is visible to query l only if s <= l.
        scale: factor on the scores; ``1/sqrt(d)`` if None.
        enable_gqa: each head of key and value serves a group of consecutive query heads.
        key_mask: boolean ``[batch, s]``, True = keep; batch is all batch dimensions in one.
        key_lengths: integer ``[batch]``: keys at and beyond it are hidden.
        keep: boolean ``[*batch, heads, l, s]``, the dropout mask of the probabilities.

    Returns:
        (output ``[*batch, heads, l, e]``, log-sum-exp ``[*batch, heads, l]``). A query that sees no
        key gets output 0, gradient 0 and log-sum-exp -inf.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.shape[-1], 1))
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(group, dim=-3) for tensor in (key, value))
    leading = (tensor.shape[:-2] for tensor in (query, key, value))
    batch = torch.broadcast_shapes(*leading)  # type: ignore[no-untyped-call]
    query = query.expand(*batch, -1, -1)

    s = scale * torch.einsum("...ld,...sd->...ls", query, key)
    s = masked(s, attn_mask, is_causal)
    if key_mask is not None:
        s = masked(s, _over_rows(key_mask, s, enable_gqa), is_causal=False)
    if key_lengths is not None:
        position = torch.arange(s.shape[-1], device=s.device)
        s = masked(s, _over_rows(position < key_lengths[:, None], s, enable_gqa), is_causal=False)

    removed = (s == -torch.inf).all(-1, keepdim=True)
    s = s.masked_fill(removed, 0.0)  # so that no inf - inf arises in either direction
    lse = s.logsumexp(-1).masked_fill(removed.squeeze(-1), -torch.inf)
    p = normalized(s, -1).exp().masked_fill(removed, 0.0)
    output = torch.einsum("...ls,...se->...le", dropped(p, dropout_p, keep), value)
    return output, lse


def _over_rows(visible: Tensor, scores: Tensor, grouped: bool) -> Tensor:
    """``[batch, s]`` as a mask of ``[*batch, heads, l, s]``, or of 3-D scores ``[batch, l, s]``.

    3-D scores of grouped heads are ``[heads, l, s]`` of one sequence.
    """
    heads = 1 if scores.dim() > 3 or grouped else 0
    batch = scores.shape[: -2 - heads]
    return visible.reshape(*batch, *(1,) * (heads + 1), scores.shape[-1])
