"""Norms of the makers of models, and whether fused steps may stand for calling them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fusedformer.nn import LayerNorm
from fusedformer.nn.children import is_plain


def is_plain_norm(norm: Any) -> bool:
    """Return whether ``norm`` is one that the fused steps know, or none at all."""
    if is_plain(norm, LayerNorm, nn.LayerNorm):
        return len(norm.normalized_shape) == 1
    return is_plain(norm, nn.Identity)
