"""Disentangled attention, DeBERTa's, padded and packed."""

from __future__ import annotations

import math

from torch import Tensor

from fusedformer import ops
from fusedformer._internal import attention_checks
from fusedformer._internal.autocast import autocast_dtype, cast


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
) -> Tensor:
    """Attention whose scores add content to position: no matrix of queries by keys in memory.

    ``score[i, j] = scale * (q_i k_j + q_i position_key[b] + k_j position_query[b])``, where b is
    the bucket of the distance i - j. Memory for the position terms is ``2 * span`` numbers for each
    query (key) and head, whatever the length; they are not kept for the backward.

    Args:
        query: ``[batch, heads, L, dim]``, or packed ``[total_q, heads, dim]``; read by strides.
        key: ``[batch, heads, S, dim]``, or packed ``[total_k, heads, dim]``.
        value: the same, of any ``dim``.
        position_key: ``[heads, 2 * span, dim]``: a key for each bucket of distances (content to
            position); None leaves the term out, but not both.
        position_query: the same, a query for each (position to content).
        max_distance: None: distance d has bucket ``span + d``, and the first and the last have all
            beyond. Else so up to ``span // 2``; larger distances share logarithmically wider
            buckets, up to about this one (``max_relative_positions`` of transformers, with
            ``position_buckets`` as ``span``).
        key_mask: boolean ``[batch, S]``, True = keep; of the padded form.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: of the packed form, as for
            :func:`varlen_attention`.
        dropout_p: probability that an attention weight is dropped, in [0, 1]; applies in eval too.
        scale: factor on the scores; ``1 / sqrt(dim * (1 + number of position terms))`` if None.

    Returns:
        The shape of ``query`` with the last dimension of ``value``; differentiable in all tensors
        but the mask and the starts. A query with no visible key gets output and gradient 0.

    Raises:
        TypeError: dtypes that differ, but under autocast, or that the backend does not support.
        ValueError: shapes that do not fit, tensors on different devices, no position term,
            ``key_mask`` of packed sequences, ``dropout_p`` outside [0, 1], a ``max_distance`` that
            is not above ``span // 2 + 1``, or comes with an odd ``span``.

    Source: He et al., DeBERTa, arXiv:2006.03654; logarithmic buckets: its second version.
    """
    dtype = autocast_dtype("scaled_dot_product_attention", query)
    if dtype is not None:
        query, key, value, position_key, position_query = (
            cast(x, dtype) for x in (query, key, value, position_key, position_query)
        )
    starts = cu_seqlens_q, cu_seqlens_k
    attention_checks.check_disentangled(
        query, key, value, position_key, position_query, max_distance, key_mask, *starts,
        max_seqlen_q, max_seqlen_k, dropout_p, scale,
    )  # fmt: skip
    terms = (position_key is not None) + (position_query is not None)
    settings = ops.DisentangledSettings(
        max_distance or 0, key_mask, *starts, None, max_seqlen_q or 0, max_seqlen_k or 0, dropout_p,
        1.0 / math.sqrt(max(query.shape[-1], 1) * (1 + terms)) if scale is None else float(scale),
    )  # fmt: skip
    packed = cu_seqlens_q is not None
    if packed:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    inputs = ops.DisentangledInputs(query, key, value, position_key, position_query)
    output = ops.disentangled_attention(inputs, settings)
    return output[0].transpose(0, 1) if packed else output
