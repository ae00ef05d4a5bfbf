"""The terms of attention's scores, from the arguments of the public functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusedformer_kernels.attention.terms import N_TENSORS as N_TENSORS
from fusedformer_kernels.attention.terms import OF_HEADS_ALONE as OF_HEADS_ALONE
from fusedformer_kernels.attention.terms import AttentionTerms as AttentionTerms
from fusedformer_kernels.attention.terms import PositionTerms as PositionTerms


def attention_terms(query: Tensor, options: Mapping[str, Any]) -> AttentionTerms:
    """The terms that checked ``options`` mean, the arguments of the functions by name."""
    left, right = window_bounds(options["window"], options["is_causal"])
    slopes: Tensor | None = options["alibi_slopes"]
    return AttentionTerms(
        mask=options["attn_mask"],
        key_mask=options.get("key_mask"),
        key_lengths=options["key_lengths"],
        slopes=slopes[None] if slopes is not None and slopes.dim() == 1 else slopes,
        table=options["relative_bias"],
        gate=options["relative_bias_gate"],
        sinks=options["sinks"],
        p=options["dropout_p"],
        left=left,
        right=right,
        align_end=options["causal_alignment"] == "bottom_right",
        scale=scale_of(options["scale"], query),
        softcap=options["softcap"],
    )


def self_attention_terms(
    head_dim: int,
    dropout_p: float,
    *,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> AttentionTerms:
    """The terms of a layer's attention to itself, padded, or packed if there are starts."""
    return AttentionTerms(
        mask=attn_mask,
        key_mask=key_mask,
        starts_q=cu_seqlens_q,
        starts_k=cu_seqlens_k,
        p=dropout_p,
        right=0 if is_causal else None,
        scale=1.0 / math.sqrt(max(head_dim, 1)),
        max_queries=max_seqlen_q,
        max_keys=max_seqlen_k,
    )


def scale_of(scale: float | None, query: Tensor) -> float:
    """The factor on the scores, of what may be None."""
    return 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)


def window_bounds(window: tuple[int, int] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """(left, right) reach of the visible keys, None if unbounded; causality is right = 0."""
    left, right = (-1, -1) if window is None else window
    if is_causal:
        right = 0
    return None if left < 0 else left, None if right < 0 else right
