"""Define rotary position embedding, and the norm of heads before it."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    norm: str | None = None,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of columns of queries and keys by the angles of their positions.

    Args:
        query, key: ``[batch, heads, length, dim]``, or packed ``[total, heads, dim]``.
        cos, sin: ``[rows, pairs]`` or ``[batch, rows, pairs]``.
        positions: ``[batch, length]``, packed ``[total]``; None for the row of its place.
        interleaved: pairs are columns (0, 1), (2, 3), ... rather than (0, pairs), (1, pairs + 1).
        norm: ``"rms"``, ``"layer"`` or None, over ``dim``, with the weights and ``eps`` given.
    """

    def turned(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if norm is not None:
            if norm == "layer":
                x = x - x.mean(-1, keepdim=True)
            x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
            x = x if weight is None else x * weight
            x = x if bias is None else x + bias
        pairs = cos.shape[-1]
        columns = torch.arange(2 * pairs, device=x.device)
        first = columns[::2] if interleaved else columns[:pairs]
        second = columns[1::2] if interleaved else columns[pairs:]
        c, s = angle(cos), angle(sin)
        y = x.clone()
        y[..., first] = x[..., first] * c - x[..., second] * s
        y[..., second] = x[..., second] * c + x[..., first] * s
        return y

    def angle(table: Tensor) -> Tensor:
        """Return ``[batch or 1, 1, length, pairs]``, packed ``[total, 1, pairs]``."""
        if query.dim() == 3:
            rows = table if table.dim() == 2 else table[0]
            rows = rows[: query.shape[0]] if positions is None else rows[positions]
            return rows[:, None]
        length = query.shape[2]
        if positions is None:
            rows = table[..., :length, :]
        elif table.dim() == 2:
            rows = table[positions]
        else:
            tables = table.expand(query.shape[0], -1, -1)
            rows = torch.stack([one[place] for one, place in zip(tables, positions, strict=True)])
        return rows[None, None] if rows.dim() == 2 else rows[:, None]

    return turned(query, query_weight, query_bias), turned(key, key_weight, key_bias)
