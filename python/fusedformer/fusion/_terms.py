"""What one node of autograd needs to know of the arguments of transformers' attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer.functional.steps import AttentionTerms, self_attention_terms
from fusedformer.fusion._attention import mask_of_sequences, reach, split_mask

# Arguments of attention that one node does not have.
_SETTINGS = ("softcap", "position_bias", "sequence_bias", "relative_bias_gate", "s_aux")


def terms_of_call(
    module: Any,
    x: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
    *,
    head_dim: int,
    dropout: float,
) -> AttentionTerms | None:
    """Return the terms of attention by ``module``; None where it has some that a node does not.

    Args:
        module: whose ``is_causal`` and, for a mask that contradicts it, configuration are read.
        x: ``[batch, length, width]``, or packed rows in a batch of 1.
        mask, kwargs: what attention is given.
        head_dim, dropout: of its heads, and of its weights in its mode.
    """
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    starts_q, starts_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    table = kwargs.get("relative_bias")
    if table is not None and table.requires_grad and torch.is_grad_enabled():
        return None
    if x.dim() != 3 or any(kwargs.get(setting) is not None for setting in _SETTINGS):
        return None
    scores = keys = None
    longest: tuple[Any, Any] = (0, 0)
    if starts_q is not None and starts_k is not None:  # they replace the mask
        scores = mask_of_sequences(mask, starts_k)
        longest = kwargs.get("max_length_q"), kwargs.get("max_length_k")
    elif mask is not None:
        scores, keys, is_causal = split_mask(module, mask, is_causal)
        if keys is not None and keys.shape != x.shape[:2]:
            return None
    if scores is not None and (scores.dim() != 4 or scores.dtype != torch.bool):
        return None
    terms = self_attention_terms(
        head_dim,
        dropout,
        attn_mask=scores,
        key_mask=keys,
        is_causal=is_causal,
        cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
        max_seqlen_q=x.shape[1] if longest[0] is None else int(longest[0]),
        max_seqlen_k=x.shape[1] if longest[1] is None else int(longest[1]),
    )
    terms = terms._replace(table=table)
    window = kwargs.get("sliding_window")
    if window is None or terms.starts_q is None:  # of others the mask contains it
        return terms
    left, right = reach(window, is_causal)
    return terms._replace(left=left, right=right)
