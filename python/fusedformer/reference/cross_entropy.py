"""Define cross entropy of logits, given or computed by a product."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer.reference.softmax import log_softmax


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute ``-sum_c w_c q_c log p_c`` of each row, with ``p`` the softmax of its logits.

    Args:
        input: logits ``[C]`` or ``[N, C, *]``.
        target: classes, int64 ``[]`` or ``[N, *]``; or the distribution itself, shaped as
            ``input``.
        weight: ``w``, ``[C]``; ones if None.
        ignore_index: a row with this class has loss 0, and counts in no mean.
        reduction: ``"none"``; ``"sum"``; or ``"mean"``: the sum over the sum of the weights of the
            rows' classes, or over the number of rows where ``target`` is a distribution.
        label_smoothing: ``q`` is ``target``, as one-hot rows, times one less this, plus a uniform
            distribution times this.
    """
    dim = 0 if input.dim() == 1 else 1
    classes = input.shape[dim]
    weights = input.new_ones(classes) if weight is None else weight
    log_p = log_softmax(input, dim).movedim(dim, -1)
    if target.is_floating_point():
        q = target.movedim(dim, -1)
        kept = torch.ones(q.shape[:-1], dtype=torch.bool, device=q.device)
        counted = torch.ones_like(q[..., 0])
    else:
        kept = target != ignore_index
        known = torch.where(kept, target, 0)
        q = torch.nn.functional.one_hot(known, classes).to(log_p.dtype)
        counted = torch.where(kept, weights[known], 0.0)
    q = q * (1.0 - label_smoothing) + label_smoothing / classes
    # A class of probability 0 adds nothing, even if its logit is -inf.
    terms = torch.where(q == 0.0, 0.0, weights * q * log_p)
    losses = torch.where(kept, -terms.sum(-1), 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute :func:`cross_entropy` of ``input @ linear_weight.T + linear_bias``.

    Args:
        input: ``[*, D]``.
        linear_weight: ``[C, D]``.
        target: classes, int64 ``[*]``, or distributions ``[*, C]``.
        linear_bias: ``[C]``, or None.
    """
    logits = input @ linear_weight.T
    if linear_bias is not None:
        logits = logits + linear_bias
    rows = logits.reshape(-1, logits.shape[-1])
    probabilities = target.is_floating_point()
    loss = cross_entropy(
        rows,
        target.reshape(rows.shape) if probabilities else target.reshape(-1),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.reshape(input.shape[:-1]) if reduction == "none" else loss
