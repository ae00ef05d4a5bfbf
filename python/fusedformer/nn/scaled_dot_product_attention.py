"""Scaled dot-product attention as a module that holds its settings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fusedformer import functional
from fusedformer._internal import checks


class ScaledDotProductAttention(torch.nn.Module):
    """:func:`fusedformer.functional.scaled_dot_product_attention` with settings kept.

    Unlike the functional form, it drops attention weights in training only.

    Args:
        dropout_p: probability that an attention weight is dropped while training, in [0, 1].
        is_causal: only keys up to a query's position are visible.
        scale: factor on the scores; ``1/sqrt(E)`` if None.
        enable_gqa: key and value may have fewer heads; each serves a group of query heads.
        window: (left, right): only keys at distances from -left to right are visible; -1 is
            unbounded.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        causal_alignment: ``"top_left"`` or ``"bottom_right"``, where lengths differ.

    Raises:
        ValueError: ``dropout_p`` outside [0, 1].
    """

    def __init__(
        self,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
        causal_alignment: Literal["top_left", "bottom_right"] = "top_left",
    ) -> None:
        checks.check_probability(type(self).__name__, "dropout_p", dropout_p)
        super().__init__()
        self.dropout_p = dropout_p
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa
        self.window = window
        self.softcap = softcap
        self.causal_alignment = causal_alignment

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        alibi_slopes: Tensor | None = None,
        relative_bias: Tensor | None = None,
        relative_bias_gate: Tensor | None = None,
        sinks: Tensor | None = None,
        key_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries ``[*batch, heads, L, E]``; return ``[*batch, heads, L, Ev]``.

        Arguments (masks: True = keep), result and errors are those of the functional form.
        """
        output: Tensor = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
            window=self.window,
            alibi_slopes=alibi_slopes,
            relative_bias=relative_bias,
            relative_bias_gate=relative_bias_gate,
            sinks=sinks,
            softcap=self.softcap,
            key_mask=key_mask,
            key_lengths=key_lengths,
            causal_alignment=self.causal_alignment,
        )
        return output

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        names = (
            "dropout_p",
            "is_causal",
            "scale",
            "enable_gqa",
            "window",
            "softcap",
            "causal_alignment",
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
