"""Compute attention weights from the statistics of the forward, for callers that ask for them.

    w = dropout(exp(s - top) / sum),  per head, or its mean over the heads

One program writes a tile of the result; for the mean it walks the heads, so that no more memory
is needed than the result takes. The gradient of s is exp(s - top) / sum * dropout'(dw), and that
of lse minus its row sums: the kernels of the attention's backward with dw in place of do v^T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import (
    Sizes,
    attention_arguments,
    layout_of,
)
from fusedformer_kernels.attention.backward import score_gradients_of
from fusedformer_kernels.attention.scores import (
    Given,
    exponentials,
    load_row_terms,
    score_tile,
    table_bias,
)
from fusedformer_kernels.attention.terms import AttentionTerms
from fusedformer_kernels.attention.tiles import (
    key_rows,
    keys_of,
    load_tile,
    place_of,
    query_rows,
    row_pointer,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    dot,
    dropout_keep_tile,
    dropout_scale,
    store,
)
from fusedformer_kernels.runtime.strided import contiguous


@triton.jit(do_not_specialize=COUNTS)
def _attention_weights(
    q_ptr, k_ptr, statistics_ptr, w_ptr, s, heads, queries, keys, in_sixteens, radius, q_layout,
    k_layout, lse_rows, plane, planes, members, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Write ``w``, contiguous [sequences, planes, queries, keys], a mean over ``members`` heads."""
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    column_blocks = tl.cdiv(keys_of(sizes), BLOCK_N)
    row_blocks = tl.cdiv(sizes.queries, BLOCK_M)
    pid = tl.program_id(0)
    first_column = (pid % column_blocks) * BLOCK_N
    first_row = (pid // column_blocks) % row_blocks * BLOCK_M
    own_plane = pid // (column_blocks * row_blocks)
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in range(0, members):
        place = place_of(s, sizes, own_plane // planes, own_plane % planes + member)
        q = load_tile(
            query_rows(q_ptr, q_layout, place), first_row, place.n_queries, q_layout, BLOCK_M,
            HEAD_DIM, BLOCK_D, False,
        )  # [BLOCK_M, BLOCK_D]
        k = load_tile(
            key_rows(k_ptr, k_layout, place), first_column, place.n_keys, k_layout, BLOCK_N,
            HEAD_DIM, BLOCK_D, False,
        )  # [BLOCK_N, BLOCK_D]
        row_base = row_pointer(statistics_ptr, sizes, place, lse_rows)
        minus_top, inverse, _ = load_row_terms(row_base, plane, None, rows, sizes.queries, SCALED)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = dot(q, tl.trans(k), scores, PRECISION)
        scores, _ = score_tile(
            scores, rows[:, None], columns[None, :], True, s, sizes, place,
            table_bias(first_row, first_column, s, place, BLOCK_M, BLOCK_N, False), True, SCALED,
        )
        weights = exponentials(scores, minus_top[:, None], s, SCALED) * inverse[:, None]
        if s.seed is not None:
            keep = dropout_keep_tile(
                place.dropout_key, place.dropout_offset, first_row, first_column, s.p, BLOCK_M,
                BLOCK_N,
            )
            weights = tl.where(keep, weights * dropout_scale(s.p), 0.0)
        total += weights
    valid = (rows < sizes.queries)[:, None] & (columns < keys_of(sizes))[None, :]
    offsets = (own_plane.to(tl.int64) * sizes.queries + rows)[:, None] * keys_of(sizes)
    offsets += columns[None, :]
    store(w_ptr + offsets, total / members, valid)


@planned
def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    statistics: torch.Tensor,
    terms: AttentionTerms,
    average: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute weights [B, H, L, S] or their mean over heads [B, 1, L, S].

    They have the dtype of ``query`` unless ``dtype`` is given.
    """
    batch, heads, n_queries, dim = query.shape
    n_keys = key.shape[2]
    planes, members = (1, heads) if average else (heads, 1)
    sizes = (batch, planes, n_queries, n_keys)
    weights = torch.empty(sizes, dtype=dtype or query.dtype, device=query.device)
    if weights.numel() == 0:
        return weights
    arguments = attention_arguments(query, key, dim, terms)
    target = targets.target_of(query.device)
    config = configs.attention_square_config(arguments.kind, target)
    blocks = targets.ceil_div(n_queries, config.block_m) * targets.ceil_div(n_keys, config.block_n)
    launch(
        _attention_weights, (blocks * batch * planes,), config, query, key, statistics, weights,
        arguments.scores, *arguments.sizes, layout_of(query), layout_of(key), n_queries,
        statistics[0].numel(), planes, members,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, **arguments.constants,
    )
    return weights


@planned
def attention_weights_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    statistics: torch.Tensor,
    terms: AttentionTerms,
    average: bool,
    needs: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Compute gradients of (query, key, lse, mask, slopes, table, gate), None if not needed."""
    heads = query.shape[1]
    statistics = contiguous(statistics)
    batch_stride, head_stride, row_stride, column_stride = grad.stride()
    if average:
        head_stride = 0
    factor = 1.0 / heads if average else 1.0
    given = Given(grad, batch_stride, head_stride, row_stride, column_stride, factor)
    needs_q, needs_k, needs_lse, *others = needs
    wanted = [needs_q, needs_k, False, *others]
    dq, dk, _, *learned, dlse = score_gradients_of(
        query, key, None, None, statistics, None, None, given, terms, wanted
    )
    return dq if needs_q else None, dk, dlse if needs_lse else None, *learned
