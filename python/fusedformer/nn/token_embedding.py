"""Embeddings of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class TokenEmbedding(torch.nn.Embedding):
    """:class:`torch.nn.Embedding` that can scale its vectors by ``sqrt(embedding_dim)``.

    Parameter ``weight`` ``[num_embeddings, embedding_dim]`` and its initialization are torch's.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
            sparse, device, dtype: as for :class:`torch.nn.Embedding`.
        scale: multiply by ``sqrt(embedding_dim)``, so that vectors drawn with a deviation of
            ``1/sqrt(embedding_dim)`` have the size of the positional encodings added to them.

    Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762, section 3.4.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        scale: bool = False,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self.scale = scale

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, *args: Any, scale: bool = False, **kwargs: Any
    ) -> TokenEmbedding:
        """Make an embedding of given vectors; arguments are torch's, and ``scale``."""
        make: Any = super().from_pretrained
        module: TokenEmbedding = make(embeddings, *args, **kwargs)
        module.scale = scale
        return module

    def forward(self, input: Tensor) -> Tensor:
        """Look up integers ``[*]``; return ``[*, embedding_dim]``."""
        output = super().forward(input)
        return output * math.sqrt(self.embedding_dim) if self.scale else output

    def extra_repr(self) -> str:
        """Return torch's settings, and the scale if there is one."""
        return super().extra_repr() + (", scale=True" if self.scale else "")
