"""Compute contrastive losses by ATen: in strips of rows, with memory linear in the batch.

The counterparts of ``fusedformer_kernels.rows.contrastive``, in the dtype of ``scale``; and the
plain formulas, where autograd itself has to differentiate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP_ROWS = 1024


def row_and_column_lse_aten(
    a: Tensor, b: Tensor, scale: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exps of rows and columns, and matched scores."""
    row, matched = (scale.new_empty(a.shape[0]) for _ in range(2))
    column = scale.new_full((b.shape[0],), -torch.inf)
    for rows, products in _strips(a, b):
        scores = products.mul_(scale)
        row[rows] = scores.logsumexp(1)
        column = torch.logaddexp(column, scores.logsumexp(0))
        matched[rows] = scores.diagonal(rows.start + offset)
    return row, column, matched


def softplus_sums_aten(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    """Return the sigmoid loss of each row."""
    losses = scale.new_empty(a.shape[0])
    for rows, products in _strips(a, b):
        scores = products.mul_(scale).add_(bias).neg_()
        scores.diagonal(rows.start + offset).neg_()
        losses[rows] = F.logsigmoid(scores).sum(1).neg_()
    return losses


def score_gradients_aten(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    offset: int,
    grads: Sequence[Any],
    lse: Sequence[Any],
    bias_grad: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, the gradients of their scores) for each strip."""
    row_grad, column_grad, matched_grad = grads
    row, column = lse
    for rows, products in _strips(a, b):
        scores, start = products.mul_(scale), rows.start + offset
        if bias is None:
            by_row = (scores - row[rows, None]).exp_().mul_(row_grad[rows, None])
            ds = scores.sub_(column).exp_().mul_(column_grad).add_(by_row)
            ds.diagonal(start).add_(matched_grad[rows])
        else:
            scores.add_(bias).diagonal(start).neg_()
            ds = scores.sigmoid_().mul_(row_grad[rows, None])
            ds.diagonal(start).neg_()
        if bias_grad is not None:
            bias_grad.add_(ds.sum())
        yield rows, ds


def _strips(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows of ``a``, their products with all of ``b``) for each strip."""
    for start in range(0, a.shape[0], STRIP_ROWS):
        rows = slice(start, min(start + STRIP_ROWS, a.shape[0]))
        yield rows, a[rows] @ b.T


def row_and_column_lse_plain(
    a: Tensor, b: Tensor, scale: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`row_and_column_lse_aten` from all scores at once."""
    scores = scale * (a.to(scale.dtype) @ b.to(scale.dtype).T)
    return scores.logsumexp(1), scores.logsumexp(0), scores.diagonal(offset)[: a.shape[0]]


def softplus_sums_plain(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, offset: int
) -> tuple[Tensor]:
    """Compute :func:`softplus_sums_aten` from all scores at once."""
    scores = scale * (a.to(scale.dtype) @ b.to(scale.dtype).T) + bias
    columns = torch.arange(b.shape[0], device=a.device)
    matched = columns == torch.arange(offset, offset + a.shape[0], device=a.device)[:, None]
    signed = torch.where(matched, scores, -scores)
    return (-F.logsigmoid(signed).sum(1),)
