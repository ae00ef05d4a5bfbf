"""softmax and log_softmax: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(
    input: Tensor, dim: int, scale: float, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """(``scale * input + mask``, -inf where masked; which slices along ``dim`` are all -inf)."""
    s = scale * input
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    if is_causal:
        rows, columns = s.shape[-2:]
        future = torch.ones(rows, columns, dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(future, -torch.inf)
    return s, (s == -torch.inf).all(dim, keepdim=True)


def log_softmax(
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """``s - log(sum(exp(s)))`` with ``s = scale * input + mask``; -inf where masked."""
    s, removed = scores(input.to(dtype or input.dtype), dim, scale, mask, is_causal)
    if mask is not None or is_causal:
        s = s.masked_fill(removed, 0.0)
    top = s.amax(dim, keepdim=True).detach()
    log_total = (s - top).exp().sum(dim, keepdim=True).log()
    y = s - top - log_total
    return y.masked_fill(removed, -torch.inf) if mask is not None or is_causal else y


def softmax(
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """``exp(s) / sum(exp(s))`` with ``s = scale * input + mask``.

    A slice that the mask removes whole is 0, with gradient 0; one that is -inf without a mask is
    NaN, as in torch.
    """
    s, removed = scores(input.to(dtype or input.dtype), dim, scale, mask, is_causal)
    if mask is not None or is_causal:
        s = s.masked_fill(removed, 0.0)
    e = (s - s.amax(dim, keepdim=True).detach()).exp()
    y = e / e.sum(dim, keepdim=True)
    return y.masked_fill(removed, 0.0) if mask is not None or is_causal else y
