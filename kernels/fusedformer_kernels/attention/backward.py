"""Compute attention's backward: gradients of query, key, value and of the terms.

    p = exp(s - top) / sum;  dv = dropout(p)^T do;  dp = dropout'(do v^T)
    delta = rowsum(do * o) - dlse;  ds = p * (dp - delta);  dq = scale * ds k;  dk = scale * ds^T q

The same inputs give the same bits. The gradients of the terms, and delta, have files of their own.
In one kernel a program owns a block of keys (of all query heads that share it) and walks the
queries: dk, dv. In one it owns a block of queries and walks the keys: dq. Scores are recomputed
from q and k, seven products in all. In one pass, where a tuned table says so, the first kernel adds
up dq too, five products (query_sums.py). Few queries have a kernel of their own (few_queries.py).
For the gradient of the attention weights themselves (weights.py), dp is a given tensor and delta 0.
Source: Dao, FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import (
    AttentionArguments,
    Layout,
    Sizes,
    attention_arguments,
    layout_of,
    precision_of,
)
from fusedformer_kernels.attention.delta import attention_delta
from fusedformer_kernels.attention.few_queries import few_queries_backward
from fusedformer_kernels.attention.gate_gradient import attention_gate_gradient
from fusedformer_kernels.attention.mask_gradient import attention_mask_gradient
from fusedformer_kernels.attention.mask_tiles import mask_tiles, tiles_of
from fusedformer_kernels.attention.query_sums import (
    QuerySums,
    add_share,
    block_of_ticket,
    cleared_query_sums,
    end_turn,
    first_sum,
    look_at_turn,
    store_query_sums,
    take_turn,
)
from fusedformer_kernels.attention.schedule import blocks_of
from fusedformer_kernels.attention.sink_gradient import attention_sink_gradient
from fusedformer_kernels.attention.slope_gradient import attention_slope_gradient
from fusedformer_kernels.attention.table_gradient import attention_table_gradient
from fusedformer_kernels.attention.terms import AttentionTerms, PositionTerms
from fusedformer_kernels.attention.tiles import (
    Given,
    exponentials,
    given_gradient,
    key_rows,
    key_tiles_of_rows,
    keys_of,
    load_pair,
    load_row_terms,
    load_tile,
    matrix_of,
    place_of,
    query_rows,
    row_pointer,
    score_gradients,
    score_tile,
    store_rows,
    tile_of,
    which_block,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    cast,
    dot,
    dropout_keep_tile,
    dropout_scale,
    fma,
    negative,
)
from fusedformer_kernels.runtime.steps import unplanned
from fusedformer_kernels.runtime.strided import contiguous


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
            sizes, place, CHECKED, SCALED,
        )
        weights = exponentials(scores, minus_top[None, :], s, SCALED)  # [BLOCK_N, BLOCK_M]
        weights *= inverse[None, :]
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
            else:
                dropped = weights
            dv = dot(cast(dropped, grad.dtype), grad, dv, PRECISION)
        if NEEDS_K:
            if given.pointer is not None:
                dweights = given_gradient(given, rows[None, :], columns[:, None], place)
            else:
                dweights = dot(v, tl.trans(grad), zeros, PRECISION)  # [BLOCK_N, BLOCK_M]
            if s.seed is not None:
                unscaled = delta[None, :] * (s.p - 1.0)  # the caller multiplies by 1 / (1 - p)
                dscores = fma(tl.maximum(weights, 0.0), dweights, tl.abs(weights) * unscaled)
            else:
                dscores = weights * (dweights - delta[None, :])
            if s.softcap is not None:
                dscores *= fma(negative(capped), capped, 1.0)
            dscores = cast(dscores, q.dtype)
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
    for member in range(0, s.group):
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
    factor = 1.0  # of kept weights, which the loop leaves out
    if s.seed is not None:
        factor = dropout_scale(s.p)
    if NEEDS_K:
        dk = tl.where(visible, dk * (s.scale * factor), 0.0)
        dk_base = matrix_of(dk_ptr, dk_layout, place.batch, key_head.to(tl.int64), place.k_start)
        store_rows(dk_base, dk_layout, columns, stored, dk, HEAD_DIM, BLOCK_D)
    if NEEDS_V:
        dv = tl.where(visible, dv * factor, 0.0)
        dv_base = matrix_of(dv_ptr, dv_layout, place.batch, key_head.to(tl.int64), place.k_start)
        store_rows(dv_base, dv_layout, columns, stored, dv, VALUE_DIM, BLOCK_DV)


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
        dq = dot(cast(dproduct, k.dtype), k, dq, PRECISION)
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


@planned
def attention_backward(
    grad: torch.Tensor | None,
    lse_grad: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    statistics: torch.Tensor,
    terms: AttentionTerms,
    needs: list[bool],
    into: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor | None, ...]:
    """Compute gradients of (query, key, value, mask, slopes, table, gate, sinks).

    None if not needed. ``statistics`` are those of the forward, of all keys; ``grad`` and
    ``lse_grad`` those of the output and of the log-sum-exp, either of which may be None. The first
    three gradients are written to ``into`` if given: views of one gradient, say.
    """
    statistics = contiguous(statistics)
    if grad is None:
        unplanned()
        grad = torch.zeros_like(output)
    precision = precision_of(query, value.shape[3])
    delta = attention_delta(grad, output, lse_grad, statistics, precision)
    gradients = score_gradients_of(
        query, key, value, grad, statistics, delta, lse_grad, Given(), terms, needs[:-1], into
    )
    dsinks = attention_sink_gradient(statistics, delta, query.dtype, terms) if needs[-1] else None
    return *gradients[:-1], dsinks


def score_gradients_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    grad: torch.Tensor | None,
    statistics: torch.Tensor,
    delta: torch.Tensor | None,
    lse_grad: torch.Tensor | None,
    given: Given,
    terms: AttentionTerms,
    needs: list[bool],
    into: tuple[torch.Tensor, ...] = (),
    positions: PositionTerms | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Compute gradients of (query, key, value, mask, slopes, table, gate, lse).

    None if not needed. They come from ``grad`` and ``delta``, or from ``given``; that of lse only
    in the second case.
    """
    needs_q, needs_k, needs_v, needs_mask, needs_slopes, needs_table, needs_gate = needs
    mask, slopes, table, gate = terms.mask, terms.slopes, terms.table, terms.gate

    def empty_like(tensor: torch.Tensor) -> torch.Tensor:
        # [batch, length, heads, dim] in memory, as the projections before attention lie.
        sizes = (tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3])
        return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device).transpose(1, 2)

    dq = dk = dv = None
    if into:
        dq, dk, dv = into
    else:
        dq = empty_like(query) if needs_q or given.pointer is not None else None
        dk = empty_like(key) if needs_k else None
        dv = empty_like(value) if needs_v and value is not None else None
    dlse = torch.empty_like(statistics[0]) if given.pointer is not None else None
    value_dim = query.shape[3] if value is None else value.shape[3]
    arguments = attention_arguments(query, key, value_dim, terms, positions)
    if statistics.numel() == 0 or key.shape[2] == 0 or arguments.sequences == 0:
        unplanned()
        wanted = zip((mask, slopes, table, gate), needs[3:], strict=True)
        zeros = [None if t is None or not need else torch.zeros_like(t) for t, need in wanted]
        first = [None if g is None else g.zero_() for g in (dq, dk, dv)]
        return *first, *zeros, None if dlse is None else dlse.zero_()
    target = targets.target_of(query.device)
    tensors = (query, key, value, grad, statistics, delta, given)
    layouts = tuple(layout_of(t) for t in (query, key, value, grad))
    few = None
    if given.pointer is None:
        few = configs.few_queries_backward_config(
            arguments.kind, target, arguments.max_queries, arguments.max_keys,
            arguments.scores.group,
        )
    if few is not None:
        work, blocks = blocks_of(arguments, terms, key.shape[2], few.block_n, of_keys=True)
        few_queries_backward(tensors, layouts, dq, dk, dv, work, blocks, arguments, few)
    else:
        _fill_gradients(tensors, layouts, dq, dk, dv, dlse, arguments, terms, target)
    dmask, dslopes, dtable, dgate = None, None, None, None
    if needs_mask and mask is not None:
        dmask = attention_mask_gradient(mask, tensors, layouts, arguments, target)
    if needs_slopes and slopes is not None:
        dslopes = attention_slope_gradient(slopes, lse_grad, tensors, layouts, arguments, target)
    if needs_table and table is not None:
        dtable = attention_table_gradient(table, tensors, layouts, arguments, target)
    if needs_gate and gate is not None:
        dgate = attention_gate_gradient(gate, lse_grad, tensors, layouts, arguments, terms, target)
    return dq, dk, dv, dmask, dslopes, dtable, dgate, dlse


def _fill_gradients(
    tensors: tuple[Any, ...],
    layouts: tuple[Layout, ...],
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dlse: torch.Tensor | None,
    arguments: AttentionArguments,
    terms: AttentionTerms,
    target: targets.Target,
) -> None:
    """Fill the gradients that are not None, by a kernel over keys and one over queries."""
    query, key, _, _, statistics, _, given = tensors
    config = configs.attention_backward_config(arguments.kind, target)
    n_rows = query.shape[2]
    plane = statistics[0].numel()
    one_loop = config.one_loop or arguments.one_loop
    parts = [(dk is not None, dv is not None)]
    if config.split_keys:
        parts = [(dk is not None, False), (False, dv is not None)]
    in_one_pass = _is_one_pass(config, arguments, target, dq, dk, dv, given)
    query_sums, sum_tiles = QuerySums(), 0
    if dk is not None or dv is not None:
        work, blocks = blocks_of(arguments, terms, key.shape[2], config.block_n, of_keys=True)
        tiles = mask_tiles(arguments, config.block_n, config.block_m, of_columns=True)
        if in_one_pass:
            query_sums, sum_tiles = cleared_query_sums(arguments, query, target, config)
        for part_k, part_v in parts:
            if part_k or part_v:
                launch(
                    _attention_backward_keys, (blocks * key.shape[1],), config, *tensors, dk, dv,
                    work, tiles, query_sums, arguments.scores, *arguments.sizes, *layouts,
                    layout_of(dk), layout_of(dv), n_rows, plane, sum_tiles,
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, NEEDS_K=part_k,
                    NEEDS_V=part_v, ONE_LOOP=one_loop, **arguments.constants,
                )
    if in_one_pass and dq is not None:
        work, blocks = blocks_of(arguments, terms, n_rows, config.block_m, of_keys=False)
        store_query_sums(
            query_sums, sum_tiles, dq, layout_of(dq), work, blocks, arguments, config.block_m
        )
    elif dq is not None:
        # This kernel's loop runs over keys, so the wide side of the tile is that of the queries.
        block_m, block_n = config.block_n, config.block_m
        work, blocks = blocks_of(arguments, terms, n_rows, block_m, of_keys=False)
        launch(
            _attention_backward_queries, (blocks * query.shape[1],), config, *tensors, dq, dlse,
            work, mask_tiles(arguments, block_m, block_n), arguments.scores, *arguments.sizes,
            *layouts, layout_of(dq), n_rows, plane, BLOCK_M=block_m, BLOCK_N=block_n,
            ONE_LOOP=one_loop, **arguments.constants,
        )


def _is_one_pass(
    config: configs.AttentionConfig,
    arguments: AttentionArguments,
    target: targets.Target,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    given: Given,
) -> bool:
    """Whether the keys' kernel gives dq too: not on ROCm, nor where a mask lists the tiles.

    Programs of several blocks of keys wait for each other there, by instructions of NVIDIA's; and
    a block of keys must know how many before it see the same queries.
    """
    return (
        config.passes == 1 and target.backend == "cuda" and not config.split_keys
        and not arguments.lists_tiles and given.pointer is None
        and dq is not None and dk is not None and dv is not None
    )
