"""Attention of packed sequences by C++ that was compiled for this CPU, in one parallel region.

ATen has no attention of packed sequences: they are copied into batches of near lengths, and each
batch is a call of its own that waits for all threads. This is what inference takes where it can,
with gradients off; masks and all other terms are left to ATen.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedformer._internal.tracing import is_eager
from fusedformer.ops.attention.terms import AttentionTerms

_DTYPES = torch.float32, torch.bfloat16
# With any of these, scores are more than products with a scale.
_MORE = (
    "mask", "key_mask", "key_lengths", "slopes", "table", "sinks", "seed", "left", "right",
    "softcap",
)  # fmt: skip


def attention_compiled(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms
) -> Tensor | None:
    """Output ``[1, H, tokens, Ev]`` of the packed form; None where this is not to compute it."""
    if terms.starts_q is None or terms.starts_k is None or not _may(query, key, value, terms):
        return None
    from fusedformer_kernels.cpu import build

    attend = build.attention()
    if attend is None:
        return None
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = q.new_empty(*q.shape[:2], v.shape[2])
    starts_q = terms.starts_q.long().contiguous()
    starts_k = starts_q
    if terms.starts_k is not terms.starts_q:
        starts_k = terms.starts_k.long().contiguous()
    tensors = q, k, v, out
    counts = (ctypes.c_int64 * 2)(q.shape[0], k.shape[0])
    strides = (ctypes.c_int64 * 8)(*[t.stride(i) for i in range(2) for t in tensors])
    fits = attend(
        q.dtype == torch.bfloat16,
        *[t.data_ptr() for t in (*tensors, starts_q, starts_k)],
        len(starts_q) - 1,
        q.shape[1],
        counts,
        strides,
        q.shape[2],
        v.shape[2],
        terms.scale,
        torch.get_num_threads(),
    )
    return out.transpose(0, 1)[None] if fits else None


def _may(query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> bool:
    """Whether this is compiled: plain tensors, no gradient, and of all terms a scale alone.

    Frozen layers below trained ones have the bits that they have when they are trained.
    """
    tensors = query, key, value
    return (
        query.dtype in _DTYPES
        and all(
            type(t) in (Tensor, Parameter)
            and t.device.type == "cpu"
            and t.dtype == query.dtype
            and t.stride(3) == 1
            for t in tensors
        )
        and query.numel() > 0
        and key.shape[1] == value.shape[1] == query.shape[1]
        and not torch.is_grad_enabled()
        and terms.scale > 0
        and not terms.p
        and all(getattr(terms, name) is None for name in _MORE)
        and is_eager()
        and not torch.is_autocast_enabled("cpu")
    )
