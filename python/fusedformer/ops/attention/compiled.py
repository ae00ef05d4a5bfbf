"""Attention of packed sequences by C++ that was compiled for this CPU, in one parallel region.

ATen has no attention of packed sequences: they are copied into batches of near lengths, and each
batch is a call of its own that waits for all threads. This is what inference takes where it can,
with gradients off; masks and all other terms are left to ATen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedformer._internal.tracing import is_eager
from fusedformer.ops.attention.terms import AttentionTerms

# With any of these, scores are more than products with a scale.
_MORE = (
    "mask", "key_mask", "key_lengths", "slopes", "table", "sinks", "seed", "left", "right",
    "softcap",
)  # fmt: skip
_PLAIN = Tensor, Parameter
_INTEGERS = torch.int32, torch.int64


def attention_compiled(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms
) -> Tensor | None:
    """Output ``[1, H, tokens, Ev]`` of the packed form; None where this is not to compute it."""
    if terms.starts_q is None or terms.starts_k is None or terms.p:
        return None
    if any(getattr(terms, name) is not None for name in _MORE):
        return None
    tensors = query, key, value, terms.starts_q, terms.starts_k
    found = packed_attention_compiled(*tensors, terms.scale)
    return None if found is None else found.transpose(1, 2)


def packed_attention_compiled(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, scale: float
) -> Tensor | None:
    """Output ``[1, tokens, H, Ev]``, contiguous, of ``[1, H, tokens, E]`` and no terms but a scale.

    None where this is not to compute it, shapes that do not fit included. Frozen layers below
    trained ones have the bits that they have when they are trained: with gradients on, ATen's.
    """
    if torch.is_grad_enabled() or not scale > 0 or not is_eager():
        return None
    dtype, (batch, heads, tokens, dim) = query.dtype, query.shape
    _, _, tokens_k, value_dim = value.shape
    if (
        not (dtype is torch.float32 or dtype is torch.bfloat16)
        or batch != 1
        or not query.numel()
        or key.shape != (1, heads, tokens_k, dim)
        or value.shape[:2] != (1, heads)
        or not (_may(query, dtype) and _may(key, dtype) and _may(value, dtype))
        or not (_are_starts(starts_q) and _are_starts(starts_k))
        or starts_q.shape != starts_k.shape
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    attend = _attend()
    if attend is None:
        return None
    out = query.new_empty((1, tokens, heads, value_dim))
    if starts_q.dtype is not starts_k.dtype:
        starts_q, starts_k = starts_q.long(), starts_k.long()
    (_, q_plane, q_row, _), (_, k_plane, k_row, _) = query.stride(), key.stride()
    _, v_plane, v_row, _ = value.stride()
    fits = attend(
        dtype is torch.bfloat16,
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
        starts_q.dtype is torch.int64, starts_q.data_ptr(), starts_k.data_ptr(),
        starts_q.shape[0] - 1, heads, tokens, tokens_k,
        q_row, q_plane, k_row, k_plane, v_row, v_plane,
        dim, value_dim, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out if fits else None


def _may(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether this reads ``tensor``: a plain one on the CPU, its rows contiguous."""
    is_plain = type(tensor) in _PLAIN and tensor.is_cpu and tensor.dtype is dtype
    return is_plain and tensor.stride(3) == 1


def _are_starts(starts: Tensor) -> bool:
    is_plain = type(starts) in _PLAIN and starts.is_cpu and starts.dtype in _INTEGERS
    return is_plain and starts.dim() == 1 and starts.is_contiguous() and starts.shape[0] > 0


def _attend() -> Any:
    from fusedformer_kernels.cpu import build

    return build.attention()
