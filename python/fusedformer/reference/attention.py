"""Define scaled dot-product attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedformer.reference.norm import dropped
from fusedformer.reference.softmax import masked, normalized


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_bias_gate: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal_alignment: str = "top_left",
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``dropout(softmax(scores)) @ value``, and the log-sum-exp of the scores.

    Letters of dimensions: queries l, keys s, head dim d, value head dim e. The distance of
    key s from query l is s - l - offset; offset is 0, or aligned at the bottom right the number of
    keys (those within ``key_lengths``) less that of queries.

    Args:
        query: ``[*batch, heads, l, d]``; leading dimensions broadcast, and may be fewer.
        key: ``[*batch, heads, s, d]``.
        value: ``[*batch, heads, s, e]``.
        attn_mask: boolean (True = keep) or floating-point (added), broadcast to ``[..., l, s]``.
        dropout_p: probability with which ``keep`` was drawn.
        is_causal: only distances up to 0 are visible.
        scale: factor on the scores; ``1/sqrt(d)`` if None.
        enable_gqa: each head of key and value serves a group of consecutive query heads.
        window: only distances from -left to right are visible; -1 is unbounded.
        alibi_slopes: ``[heads]`` or ``[batch, heads]``; -slope * |distance| is added.
        relative_bias: ``[heads or 1, 2R + 1]``; entry R + distance is added, clamped to -R and R.
        relative_bias_gate: ``[*batch, heads, l]``, a factor on what ``relative_bias`` adds.
        sinks: ``[heads]``; exp(sink) is in the denominator of each softmax of its head.
        softcap: scaled products become softcap * tanh(product / softcap) before all else.
        key_mask: boolean ``[batch, s]``, True = keep; batch is all batch dimensions in one.
        key_lengths: integer ``[batch]``: keys at and beyond it are hidden.
        causal_alignment: ``"top_left"`` or ``"bottom_right"``.
        keep: boolean ``[*batch, heads, l, s]``, the dropout mask of the probabilities.

    Returns:
        (output ``[*batch, heads, l, e]``, log-sum-exp ``[*batch, heads, l]``). A query that sees no
        key gets output 0, gradient 0 and log-sum-exp -inf, or that of the sink alone.
    """
    scores, value = _scores(
        query,
        key,
        value,
        attn_mask,
        is_causal,
        scale,
        enable_gqa,
        window,
        alibi_slopes,
        relative_bias,
        relative_bias_gate,
        softcap,
        key_mask,
        key_lengths,
        causal_alignment,
    )
    p, lse = _probabilities(scores, sinks)
    return torch.einsum("...ls,...se->...le", dropped(p, dropout_p, keep), value), lse


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_bias_gate: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal_alignment: str = "top_left",
    keep: Tensor | None = None,
    average: bool = False,
) -> Tensor:
    """Compute the weights ``[*batch, heads, l, s]`` after dropout, or their mean over heads.

    Arguments as for :func:`scaled_dot_product_attention`. ``average`` needs a dimension of heads,
    or counts its absence as one head.
    """
    scores, _ = _scores(
        query,
        key,
        key,
        attn_mask,
        is_causal,
        scale,
        enable_gqa,
        window,
        alibi_slopes,
        relative_bias,
        relative_bias_gate,
        softcap,
        key_mask,
        key_lengths,
        causal_alignment,
    )
    weights = dropped(_probabilities(scores, sinks)[0], dropout_p, keep)
    has_heads = weights.dim() > 3 or (weights.dim() == 3 and enable_gqa)
    return weights.mean(-3) if average and has_heads else weights


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias_gate: Tensor | None = None,
    key_lengths: Tensor | None = None,
    keep: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the attention of packed sequences, each by itself.

    Args:
        query: ``[total_q, heads, d]``.
        key: ``[total_k, heads, d]``.
        value: ``[total_k, heads, e]``.
        cu_seqlens_q: ``[sequences + 1]``, where the queries of each sequence begin and end.
        cu_seqlens_k: the same for keys.
        max_seqlen_q, max_seqlen_k: the sizes to which ``attn_mask`` and ``keep`` broadcast.
        attn_mask: broadcast to ``[sequences, heads, max_seqlen_q, max_seqlen_k]``.
        alibi_slopes: ``[heads]`` or ``[sequences, heads]``.
        relative_bias_gate: ``[total_q, heads]``.
        key_lengths: integer ``[sequences]``.
        keep: boolean ``[sequences, heads, max_seqlen_q, max_seqlen_k]``.
        dropout_p, is_causal, settings: as for :func:`scaled_dot_product_attention`.

    Returns:
        (output ``[total_q, heads, e]``, log-sum-exp ``[heads, total_q]``).
    """
    sequences, heads = cu_seqlens_q.shape[0] - 1, query.shape[1]
    full = (sequences, heads, max_seqlen_q, max_seqlen_k)
    outputs, lses = [query.new_zeros(0, heads, value.shape[2])], [query.new_zeros(heads, 0)]
    for b in range(sequences):
        rows = slice(*cu_seqlens_q[b : b + 2].tolist())
        columns = slice(*cu_seqlens_k[b : b + 2].tolist())
        part = (b, slice(None), slice(rows.stop - rows.start), slice(columns.stop - columns.start))
        own = alibi_slopes
        if own is not None and own.dim() == 2:
            own = own[b]
        gate = relative_bias_gate
        if gate is not None:
            gate = gate[rows].t()[None]
        length = None
        if key_lengths is not None:
            length = key_lengths[b : b + 1].clamp(max=columns.stop - columns.start)
        output, lse = scaled_dot_product_attention(
            query[rows].transpose(0, 1)[None], key[columns].transpose(0, 1)[None],
            value[columns].transpose(0, 1)[None],
            None if attn_mask is None else attn_mask.expand(full)[part], dropout_p, is_causal,
            alibi_slopes=own, relative_bias_gate=gate, key_lengths=length,
            keep=None if keep is None else keep[part], **settings,
        )  # fmt: skip
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, 1)


def merge_attention_states(
    output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries over two parts of the keys into one over all.

    Args:
        output1, output2: ``[..., l, e]``.
        lse1, lse2: ``[..., l]``.

    Returns:
        (output ``[..., l, e]``, log-sum-exp ``[..., l]``).
    """
    nothing = (lse1 == -torch.inf) & (lse2 == -torch.inf)
    first, second = (lse.masked_fill(nothing, 0.0) for lse in (lse1, lse2))
    lse = torch.stack((first, second)).logsumexp(0)
    weights = ((part - lse).exp().masked_fill(nothing, 0.0)[..., None] for part in (first, second))
    output = next(weights) * output1 + next(weights) * output2
    return output, lse.masked_fill(nothing, -torch.inf)


def relative_position_bias(
    weight: Tensor, *, bidirectional: bool = True, max_distance: int = 128
) -> Tensor:
    """Look up T5's biases by distance: ``[heads, 2 * max_distance + 1]``, of buckets' weights."""

    def bucket(distance: int) -> int:
        count, start = weight.shape[0], 0
        if bidirectional:
            count //= 2
            start, distance = (count if distance > 0 else 0), abs(distance)
        else:
            distance = max(-distance, 0)
        exact = count // 2
        if distance < exact:
            return start + distance
        share = math.log(distance / exact) / math.log(max_distance / exact)
        return start + min(exact + int(share * (count - exact)), count - 1)

    distances = range(-max_distance, max_distance + 1)
    return torch.stack([weight[bucket(d)] for d in distances], dim=1)


def _scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
    relative_bias: Tensor | None,
    relative_bias_gate: Tensor | None,
    softcap: float | None,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    causal_alignment: str,
) -> tuple[Tensor, Tensor]:
    """Compute the scores ``[*batch, heads, l, s]``, -inf where hidden; repeat grouped values."""
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.shape[-1], 1))
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(group, dim=-3) for tensor in (key, value))
    leading = (tensor.shape[:-2] for tensor in (query, key, value))
    batch = torch.broadcast_shapes(*leading)  # type: ignore[no-untyped-call]
    query = query.expand(*batch, -1, -1)

    s = scale * torch.einsum("...ld,...sd->...ls", query, key)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)

    # Terms by sequence and head, for scores seen as [sequences, heads, l, s].
    has_heads = len(batch) > 1 or enable_gqa
    heads = batch[-1] if has_heads else 1
    grid = (math.prod(batch) // max(heads, 1), heads, *s.shape[-2:])
    distance = _distances(grid[2], grid[3], key_lengths, causal_alignment, s.device)
    s = s.reshape(grid)
    if alibi_slopes is not None:
        s = s - alibi_slopes.reshape(-1, heads, 1, 1) * distance.abs()
    if relative_bias is not None:
        radius = relative_bias.shape[1] // 2
        entry = radius + distance.clamp(-radius, radius)  # [sequences or 1, 1, l, s]
        bias = relative_bias[:, entry[:, 0]].transpose(0, 1)
        if relative_bias_gate is not None:
            bias = bias * relative_bias_gate.reshape(grid[:3])[..., None]
        s = s + bias
    left, right = (-1, -1) if window is None else window
    if is_causal:
        s = masked(s, distance <= 0, is_causal=False)
    if right >= 0:
        s = masked(s, distance <= right, is_causal=False)
    if left >= 0:
        s = masked(s, distance >= -left, is_causal=False)
    if key_mask is not None:
        s = masked(s, key_mask[:, None, None, :], is_causal=False)
    if key_lengths is not None:
        within = torch.arange(grid[3], device=s.device) < key_lengths[:, None]
        s = masked(s, within[:, None, None, :], is_causal=False)
    return masked(s.reshape(*batch, *grid[2:]), attn_mask, is_causal=False), value


def _distances(
    queries: int, keys: int, key_lengths: Tensor | None, alignment: str, device: torch.device
) -> Tensor:
    """Return how far each key is from each query: ``[sequences or 1, 1, l, s]``."""
    row = torch.arange(queries, device=device)[:, None]
    column = torch.arange(keys, device=device)
    distance = (column - row)[None, None]
    if alignment == "bottom_right":
        ends = torch.tensor([keys], device=device) if key_lengths is None else key_lengths
        distance = distance - (ends.long() - queries)[:, None, None, None]
    return distance


def _probabilities(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute softmax and log-sum-exp over the keys; 0 and -inf without any key or sink."""
    keys = scores.shape[-1]
    if sinks is not None:  # as one more key
        column = sinks.reshape(-1, *(1,) * min(scores.dim() - 1, 2))
        scores = torch.cat((scores, column.expand(*scores.shape[:-1], 1)), -1)
    removed = (scores == -torch.inf).all(-1, keepdim=True)
    s = scores.masked_fill(removed, 0.0)  # avoids inf - inf, forward and backward
    lse = s.logsumexp(-1).masked_fill(removed.squeeze(-1), -torch.inf)
    return normalized(s, -1).exp().masked_fill(removed, 0.0)[..., :keys], lse
