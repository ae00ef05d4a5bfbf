"""Define contrastive losses over all pairs of two batches."""

from __future__ import annotations

import torch
from torch import Tensor


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    label_offset: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Average cross entropy over rows and over columns of ``s = logit_scale * a @ b.T``.

    The positive of row i is column p = i + label_offset:
    ``loss_i = (logsumexp(s[i, :]) + logsumexp(s[:, p])) / 2 - s[i, p]``.
    """
    logits = logit_scale * (a @ b.T)
    positives = torch.arange(label_offset, label_offset + a.shape[0], device=a.device)
    matched = logits.gather(1, positives[:, None])[:, 0]
    ends = logits.logsumexp(1) + logits.logsumexp(0)[positives]
    return reduced(0.5 * ends - matched, reduction)


def sigmoid_contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    label_offset: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Decide for every pair: ``loss_i = sum_j log(1 + exp(-z_ij * s_ij))``.

    ``s = logit_scale * a @ b.T + logit_bias``; z is 1 where j = i + label_offset, and -1 elsewhere.
    """
    logits = logit_scale * (a @ b.T) + logit_bias
    rows = torch.arange(a.shape[0], device=a.device)
    columns = torch.arange(b.shape[0], device=a.device)
    opposite = torch.where(columns == rows[:, None] + label_offset, -logits, logits)
    return reduced(torch.logaddexp(torch.zeros_like(opposite), opposite).sum(1), reduction)


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Reduce the losses of rows by ``"none"``, ``"mean"`` or ``"sum"``."""
    return losses if reduction == "none" else getattr(losses, reduction)()
