"""Compute the gradient of attention's additive mask, summed where the mask broadcasts.

One program owns a tile of the mask (whole rows or columns of the scores where the mask has size 1
there) and walks, in a fixed order, everything that shares it: batches, heads, rows, columns. The
score gradients are recomputed tile by tile, the mask's tile is read once; no [queries, keys]
temporary and no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import AttentionArguments, Layout, Sizes
from fusedformer_kernels.attention.scores import load_row_terms, mask_bias, score_gradients
from fusedformer_kernels.attention.tiles import (
    key_rows,
    load_pair,
    place_of,
    query_rows,
    row_pointer,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS, store


@triton.jit(do_not_specialize=COUNTS)
def _attention_mask_gradient(
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, delta_ptr, given, dmask_ptr, s, heads, queries,
    keys, in_sixteens, radius, q_layout, k_layout, v_layout, grad_layout, lse_rows, plane,
    n_queries, n_keys, mask_heads, mask_rows, mask_columns, shared_batch, shared_heads,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    SHARED_ROWS: tl.constexpr, SHARED_COLUMNS: tl.constexpr,
):
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    row_blocks = tl.cdiv(mask_rows, BLOCK_M)
    column_blocks = tl.cdiv(mask_columns, BLOCK_N)
    pid = tl.program_id(0)
    first_column = (pid % column_blocks) * BLOCK_N
    first_row = (pid // column_blocks) % row_blocks * BLOCK_M
    mask_plane = pid // (column_blocks * row_blocks)
    row_steps = 1
    column_steps = 1
    if SHARED_ROWS:
        row_steps = tl.cdiv(n_queries, BLOCK_M)
    if SHARED_COLUMNS:
        column_steps = tl.cdiv(n_keys, BLOCK_N)
    place = place_of(s, sizes, mask_plane // mask_heads, mask_plane % mask_heads)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    valid = (rows < n_queries)[:, None] & (columns < n_keys)[None, :]
    mask_tile = mask_bias(rows[:, None], columns[None, :], valid, s, place)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, shared_batch * shared_heads * row_steps * column_steps):
        member = step // (row_steps * column_steps)
        row_start = first_row + step // column_steps % row_steps * BLOCK_M
        start = first_column + step % column_steps * BLOCK_N
        sequence = mask_plane // mask_heads + member // shared_heads
        place = place_of(s, sizes, sequence, mask_plane % mask_heads + member % shared_heads)
        q, grad = load_pair(
            query_rows(q_ptr, q_layout, place), query_rows(grad_ptr, grad_layout, place),
            row_start, place.n_queries, q_layout, grad_layout, BLOCK_M, HEAD_DIM, VALUE_DIM,
            BLOCK_D, BLOCK_DV, False,
        )  # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
        row_base = row_pointer(statistics_ptr, sizes, place, lse_rows)
        delta_base = row_pointer(delta_ptr, sizes, place, lse_rows)
        terms = load_row_terms(
            row_base, plane, delta_base, row_start + tl.arange(0, BLOCK_M), place.n_queries, SCALED
        )
        k_base = key_rows(k_ptr, k_layout, place)
        v_base = key_rows(v_ptr, v_layout, place)  # Triton 3.6 unpacks no tuple with None
        k, v = load_pair(
            k_base, v_base, start, place.n_keys, k_layout, v_layout, BLOCK_N, HEAD_DIM, VALUE_DIM,
            BLOCK_D, BLOCK_DV, False,
        )  # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        dscores, _, _ = score_gradients(
            q, grad, k, v, terms, row_start, start, True, given, s, sizes, place, BLOCK_N, True,
            SCALED, PRECISION, mask_tile,
        )
        total += dscores
    if SHARED_ROWS:
        total = tl.sum(total, 0)[None, :]
        rows = tl.zeros([1], tl.int32)
    if SHARED_COLUMNS:
        total = tl.sum(total, 1)[:, None]
        columns = tl.zeros([1], tl.int32)
    valid = (rows < mask_rows)[:, None] & (columns < mask_columns)[None, :]
    offsets = (mask_plane.to(tl.int64) * mask_rows + rows)[:, None] * mask_columns
    store(dmask_ptr + offsets + columns[None, :], total, valid)


def attention_mask_gradient(
    mask: torch.Tensor,
    tensors: tuple[Any, ...],
    layouts: tuple[Layout, ...],
    arguments: AttentionArguments,
    target: targets.Target,
) -> torch.Tensor:
    """Compute the gradient of the additive ``mask``, 4-D with sizes 1 where it broadcasts.

    It has the mask's dtype. ``tensors`` and ``layouts`` are those of the other backward kernels.
    """
    dmask = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    if dmask.numel() == 0:
        return dmask
    simple = arguments.scores.table is None and arguments.n_features <= 1
    config = configs.attention_mask_gradient_config(arguments.kind, target, simple)
    mask_batch, mask_heads, mask_rows, mask_columns = mask.shape
    blocks = targets.ceil_div(mask_rows, config.block_m)
    blocks *= targets.ceil_div(mask_columns, config.block_n)
    n_queries, n_keys = arguments.max_queries, arguments.max_keys
    launch(
        _attention_mask_gradient, (blocks * mask_batch * mask_heads,), config, *tensors, dmask,
        arguments.scores, *arguments.sizes, *layouts, tensors[0].shape[2], tensors[4][0].numel(),
        n_queries, n_keys, mask_heads, mask_rows, mask_columns, arguments.sequences // mask_batch,
        arguments.sizes.heads // mask_heads,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, **arguments.constants,
        SHARED_ROWS=mask_rows < n_queries, SHARED_COLUMNS=mask_columns < n_keys,
    )
    return dmask
