"""Compute the gradients of keys and values: a program owns a block of keys and walks the queries.

The formulas stand in backward.py. In one pass this kernel adds up dq too: see query_sums.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import AttentionArguments, Layout, Sizes, layout_of
from fusedformer_kernels.attention.mask_tiles import mask_tiles, tiles_of
from fusedformer_kernels.attention.query_sums import (
    QuerySums,
    add_share,
    block_of_ticket,
    end_turn,
    first_sum,
    look_at_turn,
    take_turn,
)
from fusedformer_kernels.attention.schedule import blocks_of
from fusedformer_kernels.attention.scores import (
    exponentials,
    given_gradient,
    load_row_terms,
    score_tile,
    table_bias,
)
from fusedformer_kernels.attention.terms import AttentionTerms
from fusedformer_kernels.attention.tiles import (
    key_rows,
    keys_of,
    load_pair,
    load_tile,
    matrix_of,
    place_of,
    query_rows,
    row_pointer,
    store_rows,
    tile_of,
    which_block,
)
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    cast,
    dot,
    dropout_keep_tile,
    dropout_scale,
    fma,
    kept_share,
    negative,
    once_each,
)


@triton.jit
def _walk_queries(
    k, v, dk, dv, q_base, grad_base, row_base, plane, delta_base, first, last, tiles, columns,
    first_column, given, s, sizes, place, q_layout, grad_layout, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHECKED: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    NEEDS_K: tl.constexpr, NEEDS_V: tl.constexpr, PIPELINED: tl.constexpr, block, query_sums,
    sum_tile,
):
    """Add to dk and dv the shares of the tiles of queries from ``first`` to ``last``.

    Score tiles are [keys, queries]. The caller drops keys beyond the length. In one pass this
    ``block`` of keys adds its shares to the sums of these queries, the first at ``sum_tile``.
    """
    begin = first
    end = last
    if query_sums.sums is not None:  # from the last back to the first
        begin = 1 - last
        end = 1 - first
        turn = query_sums.turns + sum_tile + last  # of the last tile: turns begin at 1
    # As in the forward: one pipelined loop a kernel.
    for step in tl.range(begin, end, num_stages=None if PIPELINED else 1):
        index = step
        if query_sums.sums is not None:
            index = -step
        start, partial = tile_of(tiles, index, BLOCK_M)
        rows = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        q = load_tile(
            q_base, start, place.n_queries, q_layout, BLOCK_M, HEAD_DIM, BLOCK_D, False
        )  # [BLOCK_M, BLOCK_D]
        terms = load_row_terms(row_base, plane, delta_base, rows, place.n_queries, SCALED)
        minus_top, inverse, delta = terms
        zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        scores, capped = score_tile(
            dot(k, tl.trans(q), zeros, PRECISION), rows[None, :], columns[:, None], partial, s,
            sizes, place, table_bias(start, first_column, s, place, BLOCK_M, BLOCK_N, True),
            CHECKED, SCALED,
        )
        weights = exponentials(scores, minus_top[None, :], s, SCALED)  # [BLOCK_N, BLOCK_M]
        inverse = inverse[None, :]
        if s.seed is not None:  # before they are rounded: half precision might lose small ones
            inverse *= dropout_scale(s.p)
        weights *= inverse
        if s.seed is not None:
            keep = dropout_keep_tile(
                place.dropout_key, place.dropout_offset, start, first_column, s.p, BLOCK_M, BLOCK_N
            )
            keep = tl.trans(keep)
        if given.pointer is None:
            grad = load_tile(
                grad_base, start, place.n_queries, grad_layout, BLOCK_M, VALUE_DIM, BLOCK_DV,
                False,
            )  # [BLOCK_M, BLOCK_DV]
        if s.seed is not None:  # a sign in place of the mask: registers for one tile
            weights = tl.where(keep, weights, negative(weights))
        if NEEDS_V:
            if s.seed is not None:
                dropped = tl.maximum(weights, 0.0, propagate_nan=tl.PropagateNan.ALL)
                dropped = once_each(cast(dropped, grad.dtype))
            else:
                dropped = cast(weights, grad.dtype)
            dv = dot(dropped, grad, dv, PRECISION)
        if NEEDS_K:
            if given.pointer is not None:
                dweights = given_gradient(given, rows[None, :], columns[:, None], place)
            else:
                dweights = dot(v, tl.trans(grad), zeros, PRECISION)  # [BLOCK_N, BLOCK_M]
            if s.seed is not None:
                unscaled = delta[None, :] * negative(kept_share(s.p))
                dscores = fma(tl.maximum(weights, 0.0), dweights, tl.abs(weights) * unscaled)
            else:
                dscores = weights * (dweights - delta[None, :])
            if s.softcap is not None:
                dscores *= fma(negative(capped), capped, 1.0)
            dscores = cast(dscores, q.dtype)
            if s.seed is not None:
                dscores = once_each(dscores)
            if query_sums.sums is not None:
                seen = look_at_turn(turn)
            dk = dot(dscores, q, dk, PRECISION)
        if query_sums.sums is not None:
            zeros = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
            share = dot(tl.trans(k), dscores, zeros, PRECISION)  # [BLOCK_D, BLOCK_M]
            number = block
            if s.left is not None:  # the first block of keys that these queries see
                number -= tl.maximum(start + place.offset - s.left, 0) // BLOCK_N
            take_turn(turn, seen, number, step > begin)
            sums = query_sums.sums + (sum_tile + index).to(tl.int64) * (BLOCK_M * BLOCK_D)
            add_share(sums, share, query_sums.wide is not None)
            turn -= 1
    if query_sums.sums is not None:
        end_turn(turn + 1, last > first)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def _attention_backward_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, delta_ptr, given, dk_ptr, dv_ptr, work_ptr,
    tiles, query_sums, s, heads, queries, keys, in_sixteens, radius, q_layout, k_layout, v_layout,
    grad_layout, dk_layout, dv_layout, lse_rows, plane, sum_tiles, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr, ONE_LOOP: tl.constexpr,
):
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    key_heads = sizes.heads // s.group
    key_blocks = tl.cdiv(keys_of(sizes), BLOCK_N)
    ONE_PASS: tl.constexpr = query_sums.sums is not None
    STEP: tl.constexpr = -1 if ONE_PASS else 1
    if not ONE_PASS:
        sequence, key_head, block = which_block(work_ptr, key_heads, key_blocks, False)
    else:
        ticket = tl.atomic_add(query_sums.turns, 1, sem="relaxed")
        sequence, key_head, block = block_of_ticket(ticket, work_ptr, key_heads, key_blocks)
    if work_ptr is not None:  # noqa: SIM102 (decided by the compiler, unlike the inner one)
        if sequence < 0:
            return
    first_column = block * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    place = place_of(s, sizes, sequence, key_head * s.group)
    k, v = load_pair(
        key_rows(k_ptr, k_layout, place), key_rows(v_ptr, v_layout, place), first_column,
        place.n_keys, k_layout, v_layout, BLOCK_N, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, False,
    )  # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]

    # Queries that see any of these keys: [first, last); from `full` on they see all.
    first = tl.zeros_like(place.n_queries)
    full = first
    last = place.n_queries
    if s.right is not None:
        reach = first_column - place.offset - s.right
        first = tl.maximum(reach, 0) // BLOCK_M
        full = tl.cdiv(tl.maximum(reach + BLOCK_N - 1, 0), BLOCK_M)
    if s.left is not None:
        reach = first_column + BLOCK_N - place.offset + s.left
        last = tl.minimum(last, tl.maximum(reach, 0))
    last = tl.where(first_column < place.n_keys, tl.cdiv(last, BLOCK_M), 0)
    full = tl.minimum(full, last)
    if ONE_LOOP:
        full = first
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # What all heads of a group share would take registers of the loop over queries.
    for member in tl.range(0, s.group, disable_licm=True):
        place = place_of(s, sizes, sequence, key_head * s.group + member)
        q_base = query_rows(q_ptr, q_layout, place)
        grad_base = query_rows(grad_ptr, grad_layout, place)
        row_base = row_pointer(statistics_ptr, sizes, place, lse_rows)
        delta_base = row_pointer(delta_ptr, sizes, place, lse_rows)
        sum_tile = first_sum(s, sizes, place, sequence, sum_tiles, BLOCK_M)
        listed = None
        if tiles.entries is not None:
            listed, last = tiles_of(tiles, sequence, place.head, block)
            full = tl.zeros_like(last)
        # Tiles that must be checked, then the others; in one pass all go back from the last, where
        # blocks of keys do not wait for those before, whose diagonals are further up.
        for main in tl.static_range(1 if ONE_PASS else 0, -1 if ONE_PASS else 2, STEP):
            if main or (s.right is not None and not ONE_LOOP):
                dk, dv = _walk_queries(
                    k, v, dk, dv, q_base, grad_base, row_base, plane, delta_base,
                    full if main else first, last if main else full, listed, columns, first_column,
                    given, s, sizes, place, q_layout, grad_layout, HEAD_DIM, VALUE_DIM, BLOCK_D,
                    BLOCK_DV, BLOCK_M, BLOCK_N, ONE_LOOP or main == 0, SCALED, PRECISION, NEEDS_K,
                    NEEDS_V, main == 1, block, query_sums, sum_tile,
                )
    if ONE_PASS:  # worked out again: the loop needs the registers
        sequence, key_head, block = block_of_ticket(ticket, work_ptr, key_heads, key_blocks)
        place = place_of(s, sizes, sequence, key_head * s.group)
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    stored = columns < place.stored_keys
    visible = (columns < place.n_keys)[:, None]
    if NEEDS_K:
        dk = tl.where(visible, dk * s.scale, 0.0)
        dk_base = matrix_of(dk_ptr, dk_layout, place.batch, key_head.to(tl.int64), place.k_start)
        store_rows(dk_base, dk_layout, columns, stored, dk, HEAD_DIM, BLOCK_D)
    if NEEDS_V:
        dv = tl.where(visible, dv, 0.0)
        dv_base = matrix_of(dv_ptr, dv_layout, place.batch, key_head.to(tl.int64), place.k_start)
        store_rows(dv_base, dv_layout, columns, stored, dv, VALUE_DIM, BLOCK_DV)


def fill_key_gradients(
    tensors: tuple[Any, ...],
    layouts: tuple[Layout, ...],
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    arguments: AttentionArguments,
    terms: AttentionTerms,
    config: configs.AttentionConfig,
    query_sums: QuerySums,
    sum_tiles: int,
) -> None:
    """Fill the gradients that are not None, and in one pass add dq up in ``query_sums``."""
    query, key, _, _, statistics, _, _ = tensors
    parts = [(dk is not None, dv is not None)]
    if config.split_keys:
        parts = [(dk is not None, False), (False, dv is not None)]
    work, blocks = blocks_of(arguments, terms, key.shape[2], config.block_n, of_keys=True)
    tiles = mask_tiles(arguments, config.block_n, config.block_m, of_columns=True)
    for part_k, part_v in parts:
        if part_k or part_v:
            launch(
                _attention_backward_keys, (blocks * key.shape[1],), config, *tensors, dk, dv, work,
                tiles, query_sums, arguments.scores, *arguments.sizes, *layouts, layout_of(dk),
                layout_of(dv), query.shape[2], statistics[0].numel(), sum_tiles,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, NEEDS_K=part_k, NEEDS_V=part_v,
                ONE_LOOP=config.one_loop or arguments.one_loop, **arguments.constants,
            )
