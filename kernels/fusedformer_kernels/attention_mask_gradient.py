"""Gradient of attention's additive mask, summed over the dimensions that the mask broadcasts.

One program owns a tile of the mask (whole rows or columns of the scores where the mask has size 1
there) and walks, in a fixed order, everything that shares it: batches, heads, rows, columns. The
score gradients are recomputed tile by tile; no [queries, keys] temporary and no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels import configs
from fusedformer_kernels.attention_tiles import (
    AttentionArguments,
    load_row_terms,
    load_tile,
    score_gradients,
)
from fusedformer_kernels.launch import launch
from fusedformer_kernels.primitives import store


@triton.jit
def _attention_mask_gradient(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, mask_ptr, key_mask_ptr, key_lengths_ptr,
    seed_ptr, dmask_ptr, scale, p, n_heads, group, n_queries, n_keys,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_mask_b, stride_mask_h, stride_mask_row, stride_mask_column, stride_key_mask_b,
    stride_key_mask, mask_heads, mask_rows, mask_columns, shared_batch, shared_heads,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    SHARED_ROWS: tl.constexpr, SHARED_COLUMNS: tl.constexpr,
):
    row_blocks = tl.cdiv(mask_rows, BLOCK_M)
    column_blocks = tl.cdiv(mask_columns, BLOCK_N)
    pid = tl.program_id(0)
    first_column = (pid % column_blocks) * BLOCK_N
    first_row = (pid // column_blocks) % row_blocks * BLOCK_M
    mask_plane = (pid // (column_blocks * row_blocks)).to(tl.int64)
    mask_batch, mask_head = mask_plane // mask_heads, mask_plane % mask_heads
    last_row, last_column = first_row + BLOCK_M, first_column + BLOCK_N
    if SHARED_ROWS:
        last_row = n_queries
    if SHARED_COLUMNS:
        last_column = n_keys
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in range(0, shared_batch * shared_heads):
        batch = mask_batch + member // shared_heads
        head = mask_head + member % shared_heads
        plane = batch * n_heads + head
        key_head = head // group
        visible_keys = n_keys
        if HAS_LENGTHS:
            visible_keys = tl.minimum(n_keys, tl.load(key_lengths_ptr + batch).to(tl.int32))
        key_mask_base = key_mask_ptr
        if HAS_KEY_MASK:
            key_mask_base += batch * stride_key_mask_b
        for row_start in range(first_row, last_row, BLOCK_M):
            rows = row_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            q = load_tile(
                q_ptr + batch * stride_qb + head * stride_qh, row_start, n_queries, stride_qm,
                stride_qd, BLOCK_M, HEAD_DIM, BLOCK_D, False,
            )  # [BLOCK_M, BLOCK_D]
            grad = load_tile(
                grad_ptr + batch * stride_gb + head * stride_gh, row_start, n_queries, stride_gm,
                stride_gd, BLOCK_M, VALUE_DIM, BLOCK_DV, False,
            )  # [BLOCK_M, BLOCK_DV]
            lse, delta = load_row_terms(
                lse_ptr + plane * n_queries, delta_ptr + plane * n_queries, rows, n_queries
            )
            for start in range(first_column, last_column, BLOCK_N):
                columns = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                k = load_tile(
                    k_ptr + batch * stride_kb + key_head * stride_kh, start, n_keys, stride_kn,
                    stride_kd, BLOCK_N, HEAD_DIM, BLOCK_D, False,
                )  # [BLOCK_N, BLOCK_D]
                v = load_tile(
                    v_ptr + batch * stride_vb + key_head * stride_vh, start, n_keys, stride_vn,
                    stride_vd, BLOCK_N, VALUE_DIM, BLOCK_DV, False,
                )  # [BLOCK_N, BLOCK_DV]
                total += score_gradients(
                    q, grad, k, v, lse, delta, rows, columns, start, n_queries, visible_keys,
                    plane.to(tl.int32), mask_ptr + batch * stride_mask_b + head * stride_mask_h,
                    key_mask_base, seed_ptr, scale, 1.0, p, stride_mask_row, stride_mask_column,
                    stride_key_mask, BLOCK_N, MASK, HAS_KEY_MASK, IS_CAUSAL, True, DROPOUT,
                    SCALED, PRECISION,
                )
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    if SHARED_ROWS:
        total = tl.sum(total, 0)[None, :]
        rows = tl.zeros([1], tl.int32)
    if SHARED_COLUMNS:
        total = tl.sum(total, 1)[:, None]
        columns = tl.zeros([1], tl.int32)
    valid = (rows < mask_rows)[:, None] & (columns < mask_columns)[None, :]
    offsets = (mask_plane * mask_rows + rows)[:, None] * mask_columns + columns[None, :]
    store(dmask_ptr + offsets, total, valid)


def attention_mask_gradient(
    mask: torch.Tensor,
    tensors: tuple[torch.Tensor | None, ...],
    sizes: tuple[float | int, ...],
    strides: tuple[int, ...],
    arguments: AttentionArguments,
    target: configs.Target,
) -> torch.Tensor:
    """Gradient of the additive ``mask``, 4-D with sizes 1 where it broadcasts, in its own dtype.

    ``tensors``, ``sizes`` and ``strides`` are those that the other backward kernels get.
    """
    query, key = tensors[0], tensors[1]
    assert query is not None and key is not None
    batch, heads, n_queries, _ = query.shape
    n_keys = key.shape[2]
    dmask = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    if dmask.numel() == 0:
        return dmask
    config = configs.attention_mask_gradient_config(arguments.kind, target)
    mask_batch, mask_heads, mask_rows, mask_columns = mask.shape
    blocks = configs.ceil_div(mask_rows, config.block_m)
    blocks *= configs.ceil_div(mask_columns, config.block_n)
    launch(
        _attention_mask_gradient, (blocks * mask_batch * mask_heads,), config,
        *tensors, dmask, *sizes, *strides, *arguments.mask_strides, mask_heads, mask_rows,
        mask_columns, batch // mask_batch, heads // mask_heads,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, **arguments.constants,
        SHARED_ROWS=mask_rows < n_queries, SHARED_COLUMNS=mask_columns < n_keys,
    )
    return dmask
