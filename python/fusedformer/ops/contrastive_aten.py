"""Contrastive losses by ATen calls: in strips of rows, with memory linear in the batch.

The counterparts of ``fusedformer_kernels.contrastive``, in the dtype of ``scale``; and the plain
formulas, for what has to be differentiated by autograd itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

STRIP_ROWS = 1024


def row_and_column_lse_aten(
    a: Tensor, b: Tensor, scale: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp of each row, of each column, matched scores)."""
    row, matched = (scale.new_empty(a.shape[0]) for _ in range(2))
    column = scale.new_full((b.shape[0],), -torch.inf)
    for start, products in _strips(a, b):
        scores = products.mul_(scale)
        rows = slice(start, start + scores.shape[0])
        row[rows] = scores.logsumexp(1)
        column = torch.logaddexp(column, scores.logsumexp(0))
        matched[rows] = scores.diagonal(start + offset)
    return row, column, matched


def softplus_sums_aten(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, offset: int
) -> Tensor:
    """The sigmoid form's loss of each row."""
    losses = scale.new_empty(a.shape[0])
    for start, products in _strips(a, b):
        scores = products.mul_(scale).add_(bias)
        scores.diagonal(start + offset).neg_()
        losses[start : start + scores.shape[0]] = -torch.nn.functional.logsigmoid(-scores).sum(1)
    return losses


def score_gradients_aten(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    offset: int,
    grads: Sequence[Tensor],
    lse: Sequence[Tensor],
    bias_grad: Tensor | None,
) -> Iterator[tuple[int, Tensor]]:
    """(first row, gradient of the scores of a strip of rows), strip by strip."""
    for start, products in _strips(a, b):
        scores = products.mul_(scale)
        rows = slice(start, start + scores.shape[0])
        row_grad = grads[0][rows, None]
        if bias is None:
            row, column = lse
            by_row = (scores - row[rows, None]).exp_().mul_(row_grad)
            gradients = scores.sub_(column).exp_().mul_(grads[1]).add_(by_row)
            gradients.diagonal(start + offset).add_(grads[2][rows])
        else:
            scores.add_(bias).diagonal(start + offset).neg_()
            gradients = scores.sigmoid_().mul_(row_grad)
            gradients.diagonal(start + offset).neg_()
        if bias_grad is not None:
            bias_grad.add_(gradients.sum())
        yield start, gradients


def _strips(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, products of a strip of rows of ``a`` with all of ``b``)."""
    for start in range(0, a.shape[0], STRIP_ROWS):
        yield start, a[start : start + STRIP_ROWS] @ b.T


def row_and_column_lse_plain(
    a: Tensor, b: Tensor, scale: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`row_and_column_lse_aten`, of all scores at once."""
    scores = scale * (a.to(scale.dtype) @ b.to(scale.dtype).T)
    return scores.logsumexp(1), scores.logsumexp(0), scores.diagonal(offset)[: a.shape[0]]


def softplus_sums_plain(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, offset: int
) -> tuple[Tensor]:
    """As :func:`softplus_sums_aten`, of all scores at once."""
    scores = scale * (a.to(scale.dtype) @ b.to(scale.dtype).T) + bias
    columns = torch.arange(b.shape[0], device=a.device)
    matched = columns == torch.arange(offset, offset + a.shape[0], device=a.device)[:, None]
    signed = torch.where(matched, scores, -scores)
    return (-torch.nn.functional.logsigmoid(signed).sum(1),)
