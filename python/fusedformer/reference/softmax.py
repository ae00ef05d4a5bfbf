"""Define softmax and log_softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Compute ``s - log(sum(exp(s)))`` with ``s = scale * input + mask``; -inf where masked.

    Args:
        input: any shape with at least one dimension, any floating-point dtype.
        dim: the dimension that is normalized.
        dtype: ``input`` is cast to it first.
        scale: factor on ``input``.
        mask: boolean (True = keep) or floating-point (added), broadcast to ``input``.
        is_causal: keep column j of row i (dimensions -1 and -2) only if j <= i.

    Returns:
        Tensor of the shape of ``input``. A slice that the mask removes entirely is -inf, with
        gradient 0; one that is -inf without a mask is NaN, as in torch.
    """
    s = masked(scale * input.to(dtype or input.dtype), mask, is_causal)
    if mask is None and not is_causal:
        return normalized(s, dim)
    removed = (s == -torch.inf).all(dim, keepdim=True)
    s = s.masked_fill(removed, 0.0)  # avoids inf - inf, forward and backward
    return normalized(s, dim).masked_fill(removed, -torch.inf)


def softmax(
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Compute ``exp(s) / sum(exp(s))`` with ``s = scale * input + mask``; 0 where masked.

    Arguments as for :func:`log_softmax`, whose exponential it is: a slice that the mask removes
    entirely is 0, with gradient 0; one that is -inf without a mask is NaN, as in torch.
    """
    return log_softmax(input, dim, dtype, scale=scale, mask=mask, is_causal=is_causal).exp()


def masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Add a floating-point mask; put -inf where a boolean one or causality hides scores."""
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if is_causal:
        row = torch.arange(scores.shape[-2], device=scores.device)[:, None]
        column = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(column > row, -torch.inf)
    return scores


def normalized(scores: Tensor, dim: int) -> Tensor:
    """Compute ``s - log(sum(exp(s)))``, after subtracting the largest score for accuracy."""
    if scores.numel():
        scores = scores - scores.detach().amax(dim, keepdim=True)
    return scores - scores.logsumexp(dim, keepdim=True)
