"""Scaled dot-product attention: the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedformer.reference.norm import dropped
from fusedformer.reference.softmax import scores as masked_scores


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
    """(output ``[..., l, e]``, log-sum-exp ``[..., l]``) of queries l, keys s and head dim d.

    A query that sees no key gets output 0, gradient 0 and log-sum-exp -inf.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(group, dim=-3) for t in (key, value))
    raw = torch.einsum("...ld,...sd->...ls", query, key)
    s, _ = masked_scores(raw, -1, scale, attn_mask, is_causal)
    # Masks by sequence, [batch, s]; the batch is all that comes before the heads.
    visible = torch.ones(s.shape[-1], dtype=torch.bool, device=s.device)
    if key_mask is not None:
        visible = visible & key_mask
    if key_lengths is not None:
        visible = visible & (torch.arange(s.shape[-1], device=s.device) < key_lengths[:, None])
    if visible.dim() == 2:
        batch = s.shape[:-3] if s.dim() > 3 else s.shape[:-2]
        visible = visible.reshape(*batch, *(1,) * (s.dim() - 1 - len(batch)), s.shape[-1])
    s = s.masked_fill(~visible, -torch.inf)
    removed = (s == -torch.inf).all(-1, keepdim=True)
    s = s.masked_fill(removed, 0.0)
    if s.shape[-1] == 0:
        lse = torch.full(s.shape[:-1], -torch.inf, dtype=s.dtype, device=s.device)
        return torch.einsum("...ls,...se->...le", s, value), lse
    top = s.amax(-1, keepdim=True).detach()
    lse = (s - top).exp().sum(-1, keepdim=True).log() + top
    p = (s - lse).exp().masked_fill(removed, 0.0)
    output = torch.einsum("...ls,...se->...le", dropped(p, dropout_p, keep), value)
    return output, lse.masked_fill(removed, -torch.inf).squeeze(-1)
