"""Define disentangled attention: content and relative position score each other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedformer.reference.attention import scaled_dot_product_attention


def disentangled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_key: Tensor | None = None,
    position_query: Tensor | None = None,
    *,
    max_distance: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Compute ``dropout(softmax(scores)) @ value``.

    ``score[i, j] = scale * (q_i k_j + q_i position_key[b] + k_j position_query[b])``, where b is
    the bucket of the distance i - j.

    Args:
        query: ``[batch, heads, queries, dim]``, or packed ``[total, heads, dim]``.
        key, value: ``[batch, heads, keys, dim]``, or packed; the value of any ``dim``.
        position_key, position_query: ``[heads, 2 * span, dim]``; None leaves the term out.
        max_distance: see :func:`distance_bucket`.
        key_mask: boolean ``[batch, keys]``, True = keep.
        cu_seqlens_q, cu_seqlens_k: ``[sequences + 1]`` of the packed form.
        max_seqlen_q, max_seqlen_k: not used; the fused forms need them.
        dropout_p, keep: probability, and boolean mask of the weights ``[batch, heads, i, j]``.
        scale: factor on the scores; ``1 / sqrt(dim * (1 + number of position terms))`` if None.
    """
    settings: dict[str, Any] = {"dropout_p": dropout_p}
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        outputs = [value[:0]]
        for n in range(len(cu_seqlens_q) - 1):
            queries, keys = (slice(*x[n : n + 2]) for x in (cu_seqlens_q, cu_seqlens_k))
            q, k, v = (
                x[rows].transpose(0, 1)[None]
                for x, rows in ((query, queries), (key, keys), (value, keys))
            )
            own = None if keep is None else keep[n : n + 1, :, : q.shape[2], : k.shape[2]]
            found = disentangled_attention(
                q, k, v, position_key, position_query, max_distance=max_distance, scale=scale,
                keep=own, **settings,
            )  # fmt: skip
            outputs.append(found[0].transpose(0, 1))
        return torch.cat(outputs)
    positions = [table for table in (position_key, position_query) if table is not None]
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1] * (1 + len(positions)))
    rows, columns = (torch.arange(x.shape[2], device=query.device) for x in (query, key))
    distance = rows[:, None] - columns
    bucket = distance_bucket(distance, positions[0].shape[1] // 2, max_distance)
    terms = query.new_zeros(*query.shape[:3], key.shape[2])
    if position_key is not None:
        terms = terms + torch.einsum("bhid,hijd->bhij", query, position_key[:, bucket])
    if position_query is not None:
        terms = terms + torch.einsum("bhjd,hijd->bhij", key, position_query[:, bucket])
    settings |= {"key_mask": key_mask, "scale": scale, "keep": keep}
    output, _ = scaled_dot_product_attention(query, key, value, terms * scale, **settings)
    return output


def distance_bucket(distance: Tensor, span: int, max_distance: int | None = None) -> Tensor:
    """Compute the bucket, 0 to ``2 * span - 1``, of integer distances of any shape.

    Distance 0 has bucket ``span``. Without ``max_distance`` each distance has a bucket of its own,
    up to the first and the last, which have all beyond. With it that holds up to ``span // 2``;
    larger ones share logarithmically wider buckets, up to about ``max_distance``.
    """
    bucket = distance
    if max_distance is not None:
        exact = span // 2
        # In float32, so that the edges of buckets are those of the published models.
        far = distance.abs().clamp(min=exact).float() / exact
        step = torch.log(far) / torch.log(torch.tensor((max_distance - 1) / exact)).to(far)
        wide = torch.ceil(step * (exact - 1)).long() + exact
        bucket = torch.where(distance.abs() <= exact, distance, wide * distance.sign())
    return (bucket + span).clamp(0, 2 * span - 1)
