"""Attention of one projection's rows to themselves, its gradient written in one piece.

What is between the projections of a layer: views of ``[batch * length, 3 * heads * dim]``, which
the kernels read and write by their strides, and merged heads ``[batch * length, heads * dim]``.
"""

from __future__ import annotations

import torch

from fusedformer_kernels.attention.backward import attention_backward
from fusedformer_kernels.attention.forward import attention_forward
from fusedformer_kernels.attention.terms import AttentionTerms
from fusedformer_kernels.runtime.plans import planned

_NEEDS = [True] * 3 + [False] * 4


@planned
def self_attention_forward(
    projected: torch.Tensor, batch: int, heads: int, terms: AttentionTerms
) -> tuple[torch.Tensor, torch.Tensor]:
    """(merged heads, statistics) of contiguous ``projected`` rows; packed rows are a batch of 1."""
    query, key, value = _views(projected, batch, heads)
    output, _, statistics = attention_forward(query, key, value, terms)
    return output.transpose(1, 2).reshape(projected.shape[0], -1), statistics


@planned
def self_attention_backward(
    grad: torch.Tensor,
    projected: torch.Tensor,
    merged: torch.Tensor,
    statistics: torch.Tensor,
    batch: int,
    heads: int,
    terms: AttentionTerms,
) -> torch.Tensor:
    """Gradient of ``projected``, from that of ``merged``; no term gets one."""
    found = torch.empty_like(projected)
    query, key, value = _views(projected, batch, heads)
    attention_backward(
        _heads(grad, batch, heads), None, query, key, value, _heads(merged, batch, heads),
        statistics, terms, _NEEDS, _views(found, batch, heads),
    )
    return found


def _views(projected: torch.Tensor, batch: int, heads: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value ``[batch, heads, length, dim]``."""
    qkv = projected.view(batch, projected.shape[0] // max(batch, 1), 3, heads, -1)
    return tuple(part.transpose(1, 2) for part in qkv.unbind(2))


def _heads(merged: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """``[batch, heads, length, dim]``."""
    rows = merged.shape[0] // max(batch, 1)
    return merged.view(batch, rows, heads, merged.shape[1] // heads).transpose(1, 2)
