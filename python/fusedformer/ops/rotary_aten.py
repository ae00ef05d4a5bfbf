"""Turn queries and keys by rotary position embedding (RoPE), by ATen, and their gradients back.

Tables of cosines and sines are ``[1 or batch, length, dim]``; element ``i`` of a head turns with
element ``i + dim / 2``. Products are in float32 at least, as in transformers' models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads ``[batch, length, ..., dim]`` by the angles of their positions."""
    cos, sin = (_beside(table, x) for table in (cos, sin))
    wide = x.float()
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def rotated_gradient(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute the gradient of heads from that of what :func:`rotated` returned."""
    cos, sin = (_beside(table, grad) for table in (cos, sin))
    wide = grad.float()
    first, second = (wide * sin).chunk(2, -1)
    return (wide * cos + torch.cat((second, -first), -1)).to(grad.dtype)


def rotated_rows(rows: Tensor, cos: Tensor, sin: Tensor, batch: int, heads: int) -> Tensor:
    """Turn queries and keys of projected rows ``[batch * length, 3 * heads * dim]``."""
    return _of_rows(rotated, rows, cos, sin, batch, heads)


def rotated_rows_gradient(grad: Tensor, cos: Tensor, sin: Tensor, batch: int, heads: int) -> Tensor:
    """Compute the gradient of rows from that of what :func:`rotated_rows` returned."""
    return _of_rows(rotated_gradient, grad, cos, sin, batch, heads)


def _of_rows(
    turn: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: int,
    heads: int,
) -> Tensor:
    qkv = rows.reshape(batch, rows.shape[0] // max(batch, 1), 3, heads, -1)
    turned = turn(qkv[:, :, :2], cos, sin)
    return torch.cat((turned, qkv[:, :, 2:]), 2).reshape(rows.shape)


def _beside(table: Tensor, x: Tensor) -> Tensor:
    """View a table so that it goes with each of the dimensions between length and dim."""
    return table.view(*table.shape[:2], *[1] * (x.dim() - 3), table.shape[2])
