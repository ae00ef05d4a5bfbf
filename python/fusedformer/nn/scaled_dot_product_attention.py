"""Scaled dot-product attention as a module that holds its settings."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer import _checks, functional


class ScaledDotProductAttention(torch.nn.Module):
    """:func:`fusedformer.functional.scaled_dot_product_attention` with settings kept.

    Unlike the functional form, it drops attention weights in training only.

    Args:
        dropout_p: probability that an attention weight is dropped while training, in [0, 1].
        is_causal: key j is visible to query i only if j <= i (top-left aligned).
        scale: factor on the scores; ``1/sqrt(E)`` if None.
        enable_gqa: key and value may have fewer heads; each serves a group of query heads.

    Raises:
        ValueError: ``dropout_p`` outside [0, 1].
    """

    def __init__(
        self,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        _checks.check_probability(type(self).__name__, "dropout_p", dropout_p)
        super().__init__()
        self.dropout_p = dropout_p
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """``[*batch, heads, L, E]`` to ``[*batch, heads, L, Ev]``.

        Arguments (masks: True = keep), result and errors are those of the functional form.
        """
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa,
            key_mask=key_mask, key_lengths=key_lengths,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"dropout_p={self.dropout_p}, is_causal={self.is_causal}, scale={self.scale}, "
            f"enable_gqa={self.enable_gqa}"
        )
