"""Attention of projected rows, between the projections of a layer.

Rows are ``[batch * length, heads * dim]``, or 3 times as wide where one product has given query,
key and value, or twice where one has given keys and values of a memory. Views of them are read, and
their gradients written, by their strides.
"""

from __future__ import annotations

import torch

from fusedformer_kernels.attention.backward import attention_backward
from fusedformer_kernels.attention.forward import attention_forward
from fusedformer_kernels.attention.terms import OF_HEADS_ALONE, AttentionTerms
from fusedformer_kernels.runtime.plans import planned

# Of all three; or query, and key and value in one; or query, key and value.
Projected = tuple[torch.Tensor, ...]


@planned
def self_attention_forward(
    projected: Projected, batch: int, heads: int, terms: AttentionTerms
) -> tuple[torch.Tensor, torch.Tensor]:
    """(merged heads, statistics) of contiguous rows; packed rows are a batch of 1."""
    query, key, value = _views(projected, batch, heads)
    output, _, statistics = attention_forward(query, key, value, terms)
    return output.transpose(1, 2).reshape(projected[0].shape[0], -1), statistics


@planned
def self_attention_backward(
    grad: torch.Tensor,
    projected: Projected,
    merged: torch.Tensor,
    statistics: torch.Tensor,
    batch: int,
    heads: int,
    terms: AttentionTerms,
) -> Projected:
    """Gradients of ``projected``, from that of ``merged``; no term gets one."""
    found = tuple(torch.empty_like(rows) for rows in projected)
    query, key, value = _views(projected, batch, heads)
    attention_backward(
        _heads(grad, batch, heads), None, query, key, value, _heads(merged, batch, heads),
        statistics, terms, OF_HEADS_ALONE, _views(found, batch, heads),
    )
    return found


def _views(projected: Projected, batch: int, heads: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value ``[batch, heads, length, dim]``."""
    if len(projected) == 3:
        return tuple(_heads(rows, batch, heads) for rows in projected)
    *query, rows = projected
    together, length = 3 - len(query), rows.shape[0] // max(batch, 1)
    parts = rows.view(batch, length, together, heads, rows.shape[1] // (together * heads))
    first = [_heads(one, batch, heads) for one in query]
    return (*first, *(part.transpose(1, 2) for part in parts.unbind(2)))


def _heads(rows: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """``[batch, heads, length, dim]``."""
    length = rows.shape[0] // max(batch, 1)
    return rows.view(batch, length, heads, rows.shape[1] // heads).transpose(1, 2)
