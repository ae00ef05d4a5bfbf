"""Pooling of hidden states to one vector for each sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_pooling(hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Compute the mean of hidden states over each sequence's real tokens.

    It is summed in at least float32.

    Args:
        hidden: ``[B, L, d]``, floating-point. Values at masked positions do not matter.
        attention_mask: ``[B, L]``, nonzero = real token; None if all are.

    Returns:
        ``[B, d]``, float32 (float64 for float64 input); 0 for a sequence without real tokens.

    Raises:
        ValueError: ``hidden`` is not 3-D, or ``attention_mask`` is not ``[B, L]``.
    """
    if hidden.dim() != 3:
        raise ValueError(
            f"mean_pooling(): expected 'hidden' of shape [B, L, d], but got {tuple(hidden.shape)}"
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if attention_mask is None:
        return hidden.mean(1, dtype=dtype)
    if attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"mean_pooling(): expected 'attention_mask' of shape {tuple(hidden.shape[:2])}, "
            f"but got {tuple(attention_mask.shape)}"
        )
    real = (attention_mask != 0)[..., None]
    # masked_fill rather than a product, as values at padding may be infinite or NaN.
    total = hidden.masked_fill(~real, 0.0).sum(1, dtype=dtype)
    return total / real.sum(1).clamp(min=1)


def sentence_embeddings(hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Scale :func:`mean_pooling` to length 1: a dot product of two is their cosine.

    Arguments, result and errors are those of :func:`mean_pooling`.

    Source: Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084.
    """
    return F.normalize(mean_pooling(hidden, attention_mask), dim=-1)
