"""Attention weights from the saved log-sum-exp, for those who want to look at them.

    w = dropout(exp(s - lse)),  per head, or its mean over the heads

One program writes a tile of the result; for the mean it walks the heads, so that no more memory
is needed than the result takes. The gradient of s is exp(s - lse) * dropout'(dw), and that of lse
minus its row sums: the kernels of the attention's backward with dw in place of do v^T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels import configs
from fusedformer_kernels.attention_arguments import (
    AttentionTerms,
    attention_arguments,
    layout_of,
)
from fusedformer_kernels.attention_backward import score_gradients_of
from fusedformer_kernels.attention_tiles import (
    Given,
    exponent_scale,
    load_row_terms,
    load_tile,
    matrix_of,
    place_of,
    row_pointer,
    score_tile,
)
from fusedformer_kernels.launch import launch
from fusedformer_kernels.primitives import dot, dropout_keep_tile, dropout_scale, store


@triton.jit
def _attention_weights(
    q_ptr, k_ptr, lse_ptr, w_ptr, s, q_layout, k_layout, lse_rows, planes, members,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``w`` is contiguous [sequences, planes, queries, keys], a mean over ``members`` heads."""
    column_blocks = tl.cdiv(s.n_keys, BLOCK_N)
    row_blocks = tl.cdiv(s.n_queries, BLOCK_M)
    pid = tl.program_id(0)
    first_column = (pid % column_blocks) * BLOCK_N
    first_row = (pid // column_blocks) % row_blocks * BLOCK_M
    plane = pid // (column_blocks * row_blocks)
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in range(0, members):
        place = place_of(s, plane // planes, plane % planes + member)
        q = load_tile(
            matrix_of(q_ptr, q_layout, place.batch, place.head, place.q_start), first_row,
            place.n_queries, q_layout, BLOCK_M, HEAD_DIM, BLOCK_D, False,
        )  # [BLOCK_M, BLOCK_D]
        k = load_tile(
            matrix_of(k_ptr, k_layout, place.batch, place.key_head, place.k_start), first_column,
            place.n_keys, k_layout, BLOCK_N, HEAD_DIM, BLOCK_D, False,
        )  # [BLOCK_N, BLOCK_D]
        lse, _ = load_row_terms(row_pointer(lse_ptr, s, place, lse_rows), None, rows, s.n_queries)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = dot(q, tl.trans(k), scores, PRECISION)
        scores, _ = score_tile(
            scores, rows[:, None], columns[None, :], True, s, place, True, SCALED
        )
        weights = tl.exp2(scores * exponent_scale(s, SCALED) - lse[:, None])
        if s.seed is not None:
            keep = dropout_keep_tile(
                place.dropout_key, place.dropout_offset, first_row, first_column, s.p, BLOCK_M,
                BLOCK_N,
            )
            weights = tl.where(keep, weights * dropout_scale(s.p), 0.0)
        total += weights
    valid = (rows < s.n_queries)[:, None] & (columns < s.n_keys)[None, :]
    offsets = (plane.to(tl.int64) * s.n_queries + rows)[:, None] * s.n_keys + columns[None, :]
    store(w_ptr + offsets, total / members, valid)


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    terms: AttentionTerms,
    average: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Weights [B, H, L, S], or their mean over heads [B, 1, L, S]; ``dtype`` as ``query``'s."""
    batch, heads, n_queries, dim = query.shape
    n_keys = key.shape[2]
    planes, members = (1, heads) if average else (heads, 1)
    sizes = (batch, planes, n_queries, n_keys)
    weights = torch.empty(sizes, dtype=dtype or query.dtype, device=query.device)
    if weights.numel() == 0:
        return weights
    arguments = attention_arguments(query, key, dim, terms)
    target = configs.target_of(query.device)
    config = configs.attention_mask_gradient_config(arguments.kind, target)
    blocks = configs.ceil_div(n_queries, config.block_m) * configs.ceil_div(n_keys, config.block_n)
    launch(
        _attention_weights, (blocks * batch * planes,), config, query, key, lse, weights,
        arguments.scores, layout_of(query), layout_of(key), n_queries, planes, members,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, **arguments.constants,
    )
    return weights


def attention_weights_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    terms: AttentionTerms,
    average: bool,
    needs: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (query, key, lse, mask, slopes, table), None where ``needs`` says False."""
    heads = query.shape[1]
    batch_stride, head_stride, row_stride, column_stride = grad.stride()
    if average:
        head_stride = 0
    factor = 1.0 / heads if average else 1.0
    given = Given(grad, batch_stride, head_stride, row_stride, column_stride, factor)
    needs_q, needs_k, needs_lse, *others = needs
    dq, dk, _, dmask, dslopes, dtable, dlse = score_gradients_of(
        query, key, None, None, lse, None, None, given, terms, [needs_q, needs_k, False, *others]
    )
    return dq if needs_q else None, dk, dlse if needs_lse else None, dmask, dslopes, dtable
