"""List cases of embeddings with their norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusedformer import functional, reference
from fusedformer.parity.cases.case import Case, Op, normal


def stock_embedding(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    total = F.embedding(input, weight, padding_idx)
    if token_type_weight is not None:
        ids = torch.zeros_like(input) if token_type_ids is None else token_type_ids
        total = total + F.embedding(ids, token_type_weight)
    if position_ids is not None and position_weight is not None:
        total = total + F.embedding(position_ids, position_weight)
    return F.layer_norm(total, weight.shape[1:], norm_weight, norm_bias, eps)


def embedding_cases() -> Iterator[Case]:
    def ids(generator: Generator) -> dict[str, Tensor]:
        counts = {"input": 50, "position_ids": 16, "token_type_ids": 2}
        return {n: torch.randint(c, (3, 9), generator=generator) for n, c in counts.items()}

    def bert(generator: Generator) -> dict[str, Tensor]:
        tables = normal(
            weight=(50, 96),
            position_weight=(16, 96),
            token_type_weight=(2, 96),
            norm_weight=(96,),
            norm_bias=(96,),
        )
        return {**ids(generator), **tables(generator)}

    def tokens(generator: Generator) -> dict[str, Tensor]:
        return {"input": ids(generator)["input"], **normal(weight=(50, 131))(generator)}

    name = "embedding_layer_norm"
    op = Op(name, getattr(functional, name), stock_embedding, getattr(reference, name))
    yield Case(op, "token, position and type", bert, quick=True)
    yield Case(op, "tokens alone, padding", tokens, {"padding_idx": 3})
