"""List cases of the contrastive losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusedformer import functional, reference
from fusedformer.parity.cases.case import Case, Op, normal


def stock_contrastive(
    a: Tensor, b: Tensor, logit_scale: Tensor, label_offset: int = 0, reduction: str = "mean"
) -> Tensor:
    """Compute CLIP's loss as training code does: scores in their dtype, losses in float32."""
    logits = (logit_scale * (a @ b.T)).to(torch.promote_types(a.dtype, torch.float32))
    labels = torch.arange(label_offset, label_offset + a.shape[0], device=a.device)
    rows = F.cross_entropy(logits, labels, reduction=reduction)
    own = torch.arange(a.shape[0], device=a.device)
    columns = F.cross_entropy(logits.T[labels], own, reduction=reduction)
    return (rows + columns) / 2


def stock_sigmoid_contrastive(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    label_offset: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Compute SigLIP's loss as training code does, with every pair's sign in a matrix."""
    logits = logit_scale * (a @ b.T) + logit_bias
    logits = logits.to(torch.promote_types(a.dtype, torch.float32))
    signs = -torch.ones_like(logits)
    signs.diagonal(label_offset).fill_(1.0)
    losses = -F.logsigmoid(signs * logits).sum(1)
    return losses if reduction == "none" else losses.mean()


def contrastive_cases() -> Iterator[Case]:
    def pairs(rows: int, columns: int, dims: int, scale: float, **scalars: float) -> Any:
        def make(generator: Generator) -> dict[str, Tensor]:
            shapes = normal(a=(rows, dims), b=(columns, dims))
            tensors = {n: F.normalize(t, dim=1) for n, t in shapes(generator).items()}
            given = {"logit_scale": scale, **scalars}
            return {**tensors, **{n: torch.tensor(value) for n, value in given.items()}}

        return make

    for name, stock, scalars in (
        ("contrastive_loss", stock_contrastive, {}),
        ("sigmoid_contrastive_loss", stock_sigmoid_contrastive, {"logit_bias": -4.0}),
    ):
        op = Op(name, getattr(functional, name), stock, getattr(reference, name))
        yield Case(op, "prime rows", pairs(37, 37, 48, 14.3, **scalars), quick=True)
        shifted = {"label_offset": 70, "reduction": "none"}
        yield Case(op, "more columns, shifted", pairs(67, 140, 130, 14.3, **scalars), shifted)
        yield Case(op, "CLIP's largest scale", pairs(129, 129, 64, 100.0, **scalars))
