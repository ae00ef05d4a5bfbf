"""Scaled dot-product attention, padded and packed, and what goes with it."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fusedformer import ops
from fusedformer._internal import attention_checks
from fusedformer._internal.autocast import autocast_dtype, cast
from fusedformer._internal.jagged import jagged_like
from fusedformer._internal.plans import planned

Alignment = Literal["top_left", "bottom_right"]


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    *,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window: tuple[int, int] | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    relative_bias_gate: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    key_mask: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    causal_alignment: Alignment = ...,
    return_lse: Literal[False] = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    *,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window: tuple[int, int] | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    relative_bias_gate: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    key_mask: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    causal_alignment: Alignment = ...,
    return_lse: bool = ...,
    return_weights: Literal[False, "per_head", "averaged"] = ...,
) -> Any: ...
@planned
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
    causal_alignment: Alignment = "top_left",
    return_lse: bool = False,
    return_weights: Literal[False, "per_head", "averaged"] = False,
) -> Any:
    """``dropout(softmax(scale * query @ key.T + mask)) @ value`` without the score matrix.

    Batch dimensions broadcast, missing ones too. All inputs and masks are read in place by their
    strides. All arguments may be combined. Query i sits at key position ``i + offset``: offset is
    0, or with ``causal_alignment="bottom_right"`` the number of keys (see ``key_lengths``) less
    that of queries; the distance of key j from query i is ``j - i - offset``.

    Args:
        query: ``[*batch, heads, L, E]`` (2-D ``[L, E]`` and 3-D ``[batch, L, E]`` too). Or all
            three are jagged ``torch.nested`` tensors ``[batch, heads, jagged, E]``.
        key: ``[*batch, heads, S, E]``, ``E`` from 1 to 256 on the triton backend.
        value: ``[*batch, heads, S, Ev]``, ``Ev`` from 1 to 256; may differ from ``E``.
        attn_mask: boolean (True = keep) or floating-point (added to the scaled scores),
            broadcastable to ``[*batch, heads, L, S]`` (nested: of the longest). May require a
            gradient. Tiles that a boolean mask leaves empty cost nothing.
        dropout_p: probability that an attention weight is dropped, in [0, 1]; applies in eval too.
        is_causal: key j is visible to query i only if its distance is at most 0.
        scale: factor on the scores; ``1/sqrt(E)`` if None.
        enable_gqa: key and value may have fewer heads; each serves a group of query heads.
        window: (left, right): keys are visible at distances from -left to right; -1 is unbounded.
            The cost grows with the window.
        alibi_slopes: ``[heads]`` or ``[batch, heads]``: ``-slope * abs(distance)`` is added to the
            scores. May require a gradient.
        relative_bias: ``[heads or 1, 2R + 1]``: entry ``R + distance`` is added to the scores,
            distances beyond R count as R. May require a gradient. For T5's table of buckets see
            :func:`relative_position_bias`.
        relative_bias_gate: ``[*batch, heads, L]`` (nested: ``[tokens, heads]``): a factor on what
            ``relative_bias`` adds to the scores of each query, as in WavLM. Of any floating-point
            dtype. May require a gradient.
        sinks: ``[heads]``: a logit that stands in the softmax's sum of each query of its head and
            has no value, so that weights sum to less than 1: ``exp(score_j) / (sum_k exp(score_k) +
            exp(sink))``. Neither scaled nor capped; of any floating-point dtype; -inf is none. May
            require a gradient.
        softcap: scaled scores become ``softcap * tanh(score / softcap)`` before anything is added.
        key_mask: boolean ``[batch, S]``, True = keep: key padding that needs no combined mask.
        key_lengths: integer ``[batch]``: keys and values at and beyond a sequence's length have no
            influence, whatever stands there (NaN, say).
        causal_alignment: ``"top_left"`` as in torch, or ``"bottom_right"``.
        return_lse: also return the logarithm of the softmax denominator, the sink's part included.
        return_weights: also return the attention weights after dropout, ``"per_head"`` or
            ``"averaged"`` over heads. Computed again from the log-sum-exp: no memory but theirs.

    Returns:
        ``[*batch, heads, L, Ev]`` in the dtype of ``query``; a tuple of it and what else is asked
        for, in this order: the float32 log-sum-exp ``[*batch, heads, L]`` (natural logarithm; of
        nested tensors ``[heads, tokens]``), and the weights ``[*batch, heads, L, S]`` or
        ``[*batch, L, S]`` in the dtype of ``query``, or in float32 where autocast gives torch's
        softmax that. All are differentiable. A query with no visible key gets output, weights and
        gradient 0 and log-sum-exp -inf, or that of the sink alone.

    Raises:
        TypeError: dtypes that differ, but under autocast, which casts as for torch's; or that
            the backend does not support.
        ValueError: shapes that do not fit, masks that do not broadcast, tensors on different
            devices, ``dropout_p`` outside [0, 1], settings that are not among those above.

    Source: Vaswani et al., arXiv:1706.03762; Dao, FlashAttention-2, arXiv:2307.08691; ALiBi: Press
    et al., arXiv:2108.12409; relative bias: Raffel et al., arXiv:1910.10683, its gate: Chi et al.,
    XLM-E, arXiv:2106.16138, and Chen et al., WavLM, arXiv:2110.13900; window: Beltagy et al.,
    arXiv:2004.05150; cap: Gemma Team, arXiv:2408.00118; sinks: OpenAI, gpt-oss,
    arXiv:2508.10925 (``s_aux`` in transformers; with 0 the "off-by-one" softmax), named after Xiao
    et al., arXiv:2309.17453.
    """
    options: dict[str, Any] = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale,
        "enable_gqa": enable_gqa, "window": window, "alibi_slopes": alibi_slopes,
        "relative_bias": relative_bias, "relative_bias_gate": relative_bias_gate,
        "sinks": sinks, "softcap": softcap,
        "key_lengths": key_lengths, "causal_alignment": causal_alignment, "return_lse": return_lse,
    }  # fmt: skip
    tensors = (query, key, value)
    if all(isinstance(t, Tensor) and t.is_nested for t in tensors):
        attention_checks.check_nested(*tensors, key_mask, return_weights)
        return _nested_attention(query, key, value, options)
    query, key, value, options["attn_mask"] = _autocast(query, key, value, attn_mask)
    query, key, value = _with_equal_ranks(query, key, value)
    options |= {"key_mask": key_mask, "return_weights": return_weights}
    batch = attention_checks.check_attention(query, key, value, options)
    return ops.scaled_dot_product_attention(
        query,
        key,
        value,
        ops.attention_terms(query, options),
        batch,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
        return_weights=return_weights,
        weights_dtype=autocast_dtype("softmax", query) if return_weights else None,
    )


def _autocast(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All in autocast's dtype, if it casts ``query``; a float32 mask is read as it is."""
    dtype = autocast_dtype("scaled_dot_product_attention", query)
    if dtype is None:
        return query, key, value, mask
    if not (isinstance(mask, Tensor) and mask.dtype == torch.float32):
        mask = cast(mask, dtype)
    return cast(query, dtype), cast(key, dtype), cast(value, dtype), mask


def _with_equal_ranks(*tensors: Tensor) -> list[Tensor]:
    """With dimensions of size 1 in front, as broadcasting adds them; what is wrong stays wrong."""
    if len({t.dim() for t in tensors if isinstance(t, Tensor)}) == 1:
        return list(tensors)
    if any(not isinstance(t, Tensor) or t.is_nested or t.dim() < 2 for t in tensors):
        return list(tensors)
    rank = max(t.dim() for t in tensors)
    return [t if t.dim() == rank else t[(None,) * (rank - t.dim())] for t in tensors]


def _nested_attention(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Any:
    """Jagged ``[batch, heads, jagged, dim]`` tensors through the packed form, without a copy."""
    jagged: list[Any] = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    q, k, v = (nested.values() for nested in jagged)
    starts = jagged[0].offsets()
    # The longest lengths would have to be fetched from the device: a mask has them, and else the
    # number of tokens bounds them.
    mask, longest = options["attn_mask"], [q.shape[0], k.shape[0]]
    for i in (-2, -1):
        if isinstance(mask, Tensor) and mask.dim() >= -i and mask.shape[i] > 1:
            longest[i] = mask.shape[i]
    result = varlen_attention(q, k, v, starts, jagged[1].offsets(), *longest, **options)
    output = result[0] if options["return_lse"] else result
    nested = jagged_like(output, jagged[0]).transpose(1, 2)
    return (nested, result[1]) if options["return_lse"] else nested


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = ...,
    is_causal: bool = ...,
    *,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window: tuple[int, int] | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    relative_bias_gate: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    attn_mask: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    causal_alignment: Alignment = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = ...,
    is_causal: bool = ...,
    *,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window: tuple[int, int] | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    relative_bias_gate: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    attn_mask: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    causal_alignment: Alignment = ...,
    return_lse: bool = ...,
) -> Any: ...
@planned
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
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_bias_gate: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal_alignment: Alignment = "top_left",
    return_lse: bool = False,
) -> Any:
    """:func:`scaled_dot_product_attention` of sequences that lie one after another, unpadded.

    Each sequence attends to itself alone, with the very bits that it gets alone or padded, dropout
    included. Nothing is fetched from the device; long sequences are started first.

    Args:
        query: ``[total_q, heads, E]``: all sequences' queries. Views of an interleaved projection
            ``[total, 3, heads, E]`` are read in place.
        key: ``[total_k, heads, E]``.
        value: ``[total_k, heads, Ev]``.
        cu_seqlens_q: int32 or int64 ``[sequences + 1]``: where each sequence's queries begin,
            from 0 to ``total_q``. Sequences may be empty. On the CPU the values are checked; on
            other devices, where that would synchronize, wrong ones are undefined behaviour.
        cu_seqlens_k: the same for keys and values.
        max_seqlen_q: number of queries of the longest sequence, or any bound on it.
        max_seqlen_k: the same for keys.
        attn_mask: broadcastable to ``[sequences, heads, max_seqlen_q, max_seqlen_k]``, indexed by
            positions within a sequence.
        key_lengths: integer ``[sequences]``: of a sequence's keys only so many are visible.
        dropout_p, is_causal, scale, enable_gqa, window, causal_alignment: as for
            :func:`scaled_dot_product_attention`, within each sequence.
        alibi_slopes, relative_bias, sinks, softcap: likewise.
        relative_bias_gate: ``[total_q, heads]``: a factor on what ``relative_bias`` adds.
        return_lse: also return the logarithm of the softmax denominator.

    Returns:
        ``[total_q, heads, Ev]`` in the dtype of ``query``; with ``return_lse=True`` the pair of it
        and the float32 log-sum-exp ``[heads, total_q]``.

    Raises:
        TypeError, ValueError: as :func:`scaled_dot_product_attention`.

    Source: Zeng et al., Boosting Distributed Training Performance of the Unpadded BERT Model,
    arXiv:2208.08124.
    """
    options: dict[str, Any] = {
        "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa,
        "window": window, "alibi_slopes": alibi_slopes, "relative_bias": relative_bias,
        "relative_bias_gate": relative_bias_gate, "sinks": sinks, "softcap": softcap,
        "attn_mask": attn_mask, "key_lengths": key_lengths,
        "causal_alignment": causal_alignment,
    }  # fmt: skip
    query, key, value, options["attn_mask"] = _autocast(query, key, value, attn_mask)
    where = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    attention_checks.check_varlen(query, key, value, *where, options)
    terms = ops.attention_terms(query, options)._replace(
        starts_q=cu_seqlens_q,
        starts_k=cu_seqlens_k,
        max_queries=max_seqlen_q,
        max_keys=max_seqlen_k,
    )
    return ops.varlen_attention(query, key, value, terms, return_lse=return_lse)


def merge_attention_states(
    output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attentions of the same queries over two parts of them.

    ``lse = log(exp(lse1) + exp(lse2))``, ``output = sum_i exp(lse_i - lse) * output_i``. The order
    of the parts does not matter; ring and context parallelism are compositions of it.

    Args:
        output1, output2: ``[..., L, D]``.
        lse1, lse2: float32 ``[..., L]``, from ``return_lse=True``; -inf where nothing is visible.

    Returns:
        (output ``[..., L, D]`` in the dtype of ``output1``, lse float32 ``[..., L]``), both
        differentiable in all four arguments.

    Raises:
        TypeError: dtypes that differ, or are not as above.
        ValueError: shapes or devices that differ.

    Source: Liu et al., Ring Attention with Blockwise Transformers, arXiv:2310.01889.
    """
    attention_checks.check_merge(output1, lse1, output2, lse2)
    return ops.merge_attention_states(output1, lse1, output2, lse2)


def relative_position_bias(
    weight: Tensor, *, bidirectional: bool = True, max_distance: int = 128
) -> Tensor:
    """T5's bucketed position biases as a table by distance, for ``relative_bias``.

    Distances up to a quarter (one-directional: half) of the buckets have a bucket each; those
    beyond share logarithmically wider ones, up to ``max_distance``, where the last begins.

    Args:
        weight: ``[buckets, heads]``, a bias for each bucket and head (transformers'
            ``relative_attention_bias.weight``). May require a gradient.
        bidirectional: half of the buckets are for keys after the query; else all of those are in
            bucket 0, as in a causal decoder.
        max_distance: distance from which on all share the last bucket.

    Returns:
        ``[heads, 2 * max_distance + 1]``: never the matrix of queries by keys.

    Raises:
        TypeError: ``weight`` is not a floating-point tensor.
        ValueError: ``weight`` has another shape, or too few buckets; ``max_distance`` is too small.

    Source: Raffel et al., Exploring the Limits of Transfer Learning, arXiv:1910.10683, section 2.1.
    """
    attention_checks.check_relative_position_bias(weight, bidirectional, max_distance)
    return ops.relative_position_bias(weight, bidirectional, max_distance)
