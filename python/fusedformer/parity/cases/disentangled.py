"""List cases of disentangled attention, padded and packed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from fusedformer import functional, reference
from fusedformer.parity.cases.case import Case, Op, normal
from fusedformer.reference.disentangled import distance_bucket


def stock_disentangled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_key: Tensor | None = None,
    position_query: Tensor | None = None,
    max_distance: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    **packing: Any,
) -> Tensor:
    """Compute it as transformers does, by gathers from products, in the dtype of the query.

    Of packed sequences it takes those that have as many queries as keys.
    """
    if cu_seqlens_q is not None:
        lengths = cu_seqlens_q.diff().tolist()
        sides = [torch.split(x.transpose(0, 1)[None], lengths, 2) for x in (query, key, value)]
        outputs = [
            stock_disentangled(q, k, v, position_key, position_query, max_distance)
            for q, k, v in zip(*sides, strict=True)
        ]
        return torch.cat(outputs, 2)[0].transpose(0, 1)
    tables = [table for table in (position_key, position_query) if table is not None]
    scale = 1.0 / math.sqrt(query.shape[-1] * (1 + len(tables)))
    rows, columns = (torch.arange(x.shape[2], device=query.device) for x in (query, key))
    bucket = distance_bucket(rows[:, None] - columns, tables[0].shape[1] // 2, max_distance)
    bucket = bucket.expand(*query.shape[:3], -1)
    scores = query @ key.transpose(2, 3) * scale
    if position_key is not None:
        scores = scores + (query @ position_key.transpose(1, 2)).gather(3, bucket) * scale
    if position_query is not None:
        turned = (key @ position_query.transpose(1, 2)).gather(3, bucket.transpose(2, 3))
        scores = scores + turned.transpose(2, 3) * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ value


def disentangled_cases() -> Iterator[Case]:
    op = Op(
        "disentangled_attention",
        functional.disentangled_attention,
        stock_disentangled,
        reference.disentangled_attention,
    )
    heads = dict.fromkeys(("query", "key", "value"), (2, 2, 21, 16))
    tables = {"position_key": (2, 16, 16), "position_query": (2, 16, 16)}

    def masked(generator: Generator) -> dict[str, Tensor]:
        keep = torch.rand(2, 21, generator=generator) > 0.3
        return {**normal(**heads, **tables)(generator), "key_mask": keep}

    def packed(generator: Generator) -> dict[str, Tensor]:
        rows = dict.fromkeys(heads, (40, 2, 16))
        starts = torch.tensor([0, 21, 22, 22, 40], dtype=torch.int32)
        both = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        return {**normal(**rows, **tables)(generator), **both}

    yield Case(op, "a bucket each", masked, {})
    longest = {"max_seqlen_q": 21, "max_seqlen_k": 21}
    yield Case(op, "packed, logarithmic buckets", packed, {"max_distance": 14, **longest}, True)
    one = normal(**heads, position_query=(2, 8, 16))
    yield Case(op, "position to content", one, {"max_distance": 6})
