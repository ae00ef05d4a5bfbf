"""Compute the gradient of queries: a program owns a block of queries and walks the keys.

The formulas stand in backward.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import AttentionArguments, Layout, Sizes, layout_of
from fusedformer_kernels.attention.mask_tiles import mask_tiles, tiles_of
from fusedformer_kernels.attention.schedule import blocks_of
from fusedformer_kernels.attention.scores import load_row_terms, score_gradients
from fusedformer_kernels.attention.terms import AttentionTerms
from fusedformer_kernels.attention.tiles import (
    key_rows,
    key_tiles_of_rows,
    load_pair,
    place_of,
    query_rows,
    row_pointer,
    store_rows,
    tile_of,
    which_block,
)
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS, cast, dot, once_each


@triton.jit
def _walk_keys(
    q, grad, dq, row_sum, terms, k_base, v_base, first, last, tiles, first_row, given, s, sizes,
    place, k_layout, v_layout, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, CHECKED: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, PIPELINED: tl.constexpr,
):
    """Add to dq the shares of the tiles of keys from ``first`` to ``last``."""
    # As in the forward: one pipelined loop a kernel.
    for index in tl.range(first, last, num_stages=None if PIPELINED else 1):
        start, partial = tile_of(tiles, index, BLOCK_N)
        k, v = load_pair(
            k_base, v_base, start, place.n_keys, k_layout, v_layout, BLOCK_N, HEAD_DIM, VALUE_DIM,
            BLOCK_D, BLOCK_DV, not CHECKED,
        )  # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        dscores, dproduct, _ = score_gradients(
            q, grad, k, v, terms, first_row, start, partial, given, s, sizes, place, BLOCK_N,
            CHECKED, SCALED, PRECISION,
        )
        if given.pointer is not None:
            row_sum += tl.sum(dscores, 1)
        dproduct = cast(dproduct, k.dtype)
        if s.seed is not None:
            dproduct = once_each(dproduct)
        dq = dot(dproduct, k, dq, PRECISION)
    return dq, row_sum


@triton.jit(do_not_specialize=COUNTS)
def _attention_backward_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, delta_ptr, given, dq_ptr, dlse_ptr, work_ptr,
    tiles, s, heads, queries, keys, in_sixteens, radius, q_layout, k_layout, v_layout, grad_layout,
    dq_layout, lse_rows, plane, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, ONE_LOOP: tl.constexpr,
):
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    sequence, head, block = which_block(
        work_ptr, sizes.heads, tl.cdiv(sizes.queries, BLOCK_M), s.right is not None
    )
    if work_ptr is not None:  # noqa: SIM102 (decided by the compiler, unlike the inner one)
        if sequence < 0:
            return
    place = place_of(s, sizes, sequence, head)
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q, grad = load_pair(
        query_rows(q_ptr, q_layout, place), query_rows(grad_ptr, grad_layout, place), first_row,
        place.n_queries, q_layout, grad_layout, BLOCK_M, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
        False,
    )  # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
    k_base = key_rows(k_ptr, k_layout, place)
    v_base = key_rows(v_ptr, v_layout, place)  # Triton 3.6 unpacks no tuple with None
    row_base = row_pointer(statistics_ptr, sizes, place, lse_rows)
    delta_base = row_pointer(delta_ptr, sizes, place, lse_rows)
    terms = load_row_terms(row_base, plane, delta_base, rows, place.n_queries, SCALED)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    first, full, last = key_tiles_of_rows(s, place, first_row, BLOCK_M, BLOCK_N)
    listed = None
    if tiles.entries is not None:
        listed, last = tiles_of(tiles, sequence, head, block)
        first = tl.zeros_like(last)
    if ONE_LOOP:
        full = first
    else:
        dq, row_sum = _walk_keys(
            q, grad, dq, row_sum, terms, k_base, v_base, first, full, listed, first_row,
            given, s, sizes, place, k_layout, v_layout, HEAD_DIM, VALUE_DIM, BLOCK_D,
            BLOCK_DV, BLOCK_N, False, SCALED, PRECISION, True,
        )
    dq, row_sum = _walk_keys(
        q, grad, dq, row_sum, terms, k_base, v_base, full, last, listed, first_row, given, s, sizes,
        place, k_layout, v_layout, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N,
        True, SCALED, PRECISION, ONE_LOOP,
    )
    row_valid = rows < place.n_queries
    dq_base = query_rows(dq_ptr, dq_layout, place)
    store_rows(dq_base, dq_layout, rows, row_valid, dq * s.scale, HEAD_DIM, BLOCK_D)
    if dlse_ptr is not None:
        tl.store(row_pointer(dlse_ptr, sizes, place, lse_rows) + rows, -row_sum, mask=row_valid)


def fill_query_gradients(
    tensors: tuple[Any, ...],
    layouts: tuple[Layout, ...],
    dq: torch.Tensor,
    dlse: torch.Tensor | None,
    arguments: AttentionArguments,
    terms: AttentionTerms,
    config: configs.AttentionConfig,
) -> None:
    """Fill ``dq``, and the gradient of the log-sum-exp where that of the weights is given."""
    query, statistics = tensors[0], tensors[4]
    # The loop runs over keys, so the wide side of the tile is that of the queries.
    block_m, block_n = config.block_n, config.block_m
    work, blocks = blocks_of(arguments, terms, query.shape[2], block_m, of_keys=False)
    launch(
        _attention_backward_queries, (blocks * query.shape[1],), config, *tensors, dq, dlse, work,
        mask_tiles(arguments, block_m, block_n), arguments.scores, *arguments.sizes, *layouts,
        layout_of(dq), query.shape[2], statistics[0].numel(), BLOCK_M=block_m, BLOCK_N=block_n,
        ONE_LOOP=config.one_loop or arguments.one_loop, **arguments.constants,
    )
