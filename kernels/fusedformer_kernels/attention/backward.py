"""Compute attention's backward: gradients of query, key, value and of the terms.

    p = exp(s - top) / sum;  dv = dropout(p)^T do;  dp = dropout'(do v^T)
    delta = rowsum(do * o) - dlse;  ds = p * (dp - delta);  dq = scale * ds k;  dk = scale * ds^T q

Three kernels, none with atomics, so that the same inputs give the same bits; the gradients of the
terms have files of their own. One computes delta of each query. In one a program owns a block of
keys (of all query heads that share it) and walks the queries: dk, dv. In one it owns a block of
queries and walks the keys: dq. Scores are recomputed from q and k, seven products in all. For the
gradient of the attention weights themselves (weights.py), dp is a given tensor and delta 0. Source:
Dao, FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention.arguments import (
    AttentionArguments,
    Sizes,
    attention_arguments,
    layout_of,
    precision_of,
)
from fusedformer_kernels.attention.mask_gradient import attention_mask_gradient
from fusedformer_kernels.attention.mask_tiles import mask_tiles, tiles_of
from fusedformer_kernels.attention.position_gradient import attention_position_gradients
from fusedformer_kernels.attention.schedule import work_list
from fusedformer_kernels.attention.sink_gradient import attention_sink_gradient
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
    load_strided_rows,
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
from fusedformer_kernels.runtime import configs
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


@triton.jit(do_not_specialize=COUNTS)
def _attention_delta(
    grad_ptr, o_ptr, lse_grad_ptr, delta_ptr, n_heads, n_rows, grad_layout, o_layout,
    lse_grad_strides, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write delta [BLOCK_M] = rowsum(do * o) - dlse, which all scores' gradients of a row share.

    In float32 it is the diagonal of a product, which adds in the order of do v^T: where a query is
    sure of one key, delta is exactly what that key's weight gets, and its score no gradient.
    """
    blocks = tl.cdiv(n_rows, BLOCK_M)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = plane // n_heads, plane % n_heads
    first_row = (tl.program_id(0) % blocks) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_valid = rows < n_rows
    grad = load_tile(
        matrix_of(grad_ptr, grad_layout, batch, head, 0), first_row, n_rows, grad_layout,
        BLOCK_M, VALUE_DIM, BLOCK_DV, False,
    )  # [BLOCK_M, BLOCK_DV]
    o = load_tile(
        matrix_of(o_ptr, o_layout, batch, head, 0), first_row, n_rows, o_layout, BLOCK_M,
        VALUE_DIM, BLOCK_DV, False,
    )  # [BLOCK_M, BLOCK_DV]
    if grad.dtype == tl.float32:
        zeros = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
        own = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
        delta = tl.sum(tl.where(own, dot(grad, tl.trans(o), zeros, PRECISION), 0.0), 1)
    else:
        delta = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    if lse_grad_ptr is not None:
        delta -= load_strided_rows(
            lse_grad_ptr, lse_grad_strides, batch, head, rows.to(tl.int64), row_valid
        )
    tl.store(delta_ptr + plane * n_rows + rows, delta, mask=row_valid)


@triton.jit
def _walk_queries(
    k, v, dk, dv, q_base, grad_base, row_base, plane, delta_base, first, last, tiles, columns,
    first_column, given, s, sizes, place, q_layout, grad_layout, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHECKED: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    NEEDS_K: tl.constexpr, NEEDS_V: tl.constexpr, PIPELINED: tl.constexpr,
):
    """Add to dk and dv the shares of the tiles of queries from ``first`` to ``last``.

    Score tiles are [keys, queries]. The caller drops keys beyond the length.
    """
    # As in the forward: one pipelined loop a kernel.
    for index in tl.range(first, last, num_stages=None if PIPELINED else 1):
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
        if NEEDS_V:
            dropped = weights
            if s.seed is not None:
                dropped = tl.where(keep, weights * dropout_scale(s.p), 0.0)
            dv = dot(cast(dropped, grad.dtype), grad, dv, PRECISION)
        if NEEDS_K:
            if given.pointer is not None:
                dweights = given_gradient(given, rows[None, :], columns[:, None], place)
            else:
                dweights = dot(v, tl.trans(grad), zeros, PRECISION)  # [BLOCK_N, BLOCK_M]
            if s.seed is not None:
                remainder = negative(delta)[None, :]
                kept = fma(dweights, dropout_scale(s.p), remainder)
                dscores = weights * tl.where(keep, kept, remainder)
            else:
                dscores = weights * (dweights - delta[None, :])
            if s.softcap is not None:
                dscores *= fma(negative(capped), capped, 1.0)
            dk = dot(cast(dscores, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def _attention_backward_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, delta_ptr, given, dk_ptr, dv_ptr, work_ptr,
    tiles, s, heads, queries, keys, in_sixteens, radius, q_layout, k_layout, v_layout, grad_layout,
    dk_layout, dv_layout, lse_rows, plane, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, NEEDS_K: tl.constexpr, NEEDS_V: tl.constexpr,
    ONE_LOOP: tl.constexpr,
):
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    sequence, key_head, block = which_block(
        work_ptr, sizes.heads // s.group, tl.cdiv(keys_of(sizes), BLOCK_N), False
    )
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
        listed = None
        if tiles.entries is not None:
            listed, last = tiles_of(tiles, sequence, place.head, block)
            full = tl.zeros_like(last)
        if s.right is not None and not ONE_LOOP:
            dk, dv = _walk_queries(
                k, v, dk, dv, q_base, grad_base, row_base, plane, delta_base, first, full, listed,
                columns, first_column, given, s, sizes, place, q_layout, grad_layout,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, True, SCALED, PRECISION,
                NEEDS_K, NEEDS_V, False,
            )
        dk, dv = _walk_queries(
            k, v, dk, dv, q_base, grad_base, row_base, plane, delta_base, full, last, listed,
            columns, first_column, given, s, sizes, place, q_layout, grad_layout, HEAD_DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, ONE_LOOP, SCALED, PRECISION, NEEDS_K,
            NEEDS_V, True,
        )
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
    """Compute gradients of (query, key, value, mask, slopes, table, sinks), None if not needed.

    ``statistics`` are those of the forward, of all keys; ``grad`` and ``lse_grad`` those of the
    output and of the log-sum-exp, either of which may be None. The first three gradients are
    written to ``into`` if given: views of one gradient, say.
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


def attention_delta(
    grad: torch.Tensor,
    output: torch.Tensor,
    lse_grad: torch.Tensor | None,
    statistics: torch.Tensor,
    precision: str,
) -> torch.Tensor:
    """Compute delta of each query, laid out as the first of the statistics."""
    batch, heads, n_rows, value_dim = output.shape
    delta = torch.empty_like(statistics[0])
    if delta.numel():
        block = 16 if grad.dtype == torch.float32 else 64
        launch(
            _attention_delta, (configs.ceil_div(n_rows, block) * batch * heads,),
            configs.LaunchConfig(4, 2), grad, output, lse_grad, delta, heads, n_rows,
            layout_of(grad), layout_of(output),
            (0, 0, 0) if lse_grad is None else lse_grad.stride(),
            VALUE_DIM=value_dim, BLOCK_DV=configs.padded_dim(value_dim),
            BLOCK_M=block, PRECISION=precision,
        )
    return delta


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
    """Compute gradients of (query, key, value, mask, slopes, table, lse), None if not needed.

    They come from ``grad`` and ``delta``, or from ``given``; that of lse only in the second case.
    """
    needs_q, needs_k, needs_v, needs_mask, needs_slopes, needs_table = needs
    mask, slopes, table = terms.mask, terms.slopes, terms.table

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
        wanted = zip((mask, slopes, table), needs[3:], strict=True)
        zeros = [None if t is None or not need else torch.zeros_like(t) for t, need in wanted]
        first = [None if g is None else g.zero_() for g in (dq, dk, dv)]
        return *first, *zeros, None if dlse is None else dlse.zero_()
    target = configs.target_of(query.device)
    config = configs.attention_backward_config(arguments.kind, target)
    tensors = (query, key, value, grad, statistics, delta, given)
    layouts = tuple(layout_of(t) for t in (query, key, value, grad))
    n_rows = query.shape[2]
    plane = statistics[0].numel()
    one_loop = config.one_loop or arguments.one_loop
    passes = [(needs_k, dv is not None)]
    if config.split_keys:
        passes = [(needs_k, False), (False, dv is not None)]
    if needs_k or dv is not None:
        work, blocks = blocks_of(arguments, terms, key.shape[2], config.block_n, of_keys=True)
        tiles = mask_tiles(arguments, config.block_n, config.block_m, of_columns=True)
        for pass_k, pass_v in passes:
            if pass_k or pass_v:
                launch(
                    _attention_backward_keys, (blocks * key.shape[1],), config, *tensors, dk, dv,
                    work, tiles, arguments.scores, *arguments.sizes, *layouts, layout_of(dk),
                    layout_of(dv), n_rows, plane,
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, NEEDS_K=pass_k,
                    NEEDS_V=pass_v, ONE_LOOP=one_loop, **arguments.constants,
                )
    if dq is not None:
        # This kernel's loop runs over keys, so the wide side of the tile is that of the queries.
        block_m, block_n = config.block_n, config.block_m
        work, blocks = blocks_of(arguments, terms, n_rows, block_m, of_keys=False)
        launch(
            _attention_backward_queries, (blocks * query.shape[1],), config, *tensors, dq, dlse,
            work, mask_tiles(arguments, block_m, block_n), arguments.scores, *arguments.sizes,
            *layouts, layout_of(dq), n_rows, plane, BLOCK_M=block_m, BLOCK_N=block_n,
            ONE_LOOP=one_loop, **arguments.constants,
        )
    dmask, dslopes, dtable = None, None, None
    if needs_mask and mask is not None:
        dmask = attention_mask_gradient(mask, tensors, layouts, arguments, target)
    if needs_slopes or needs_table:
        dslopes, dtable = attention_position_gradients(
            slopes if needs_slopes else None, table if needs_table else None, lse_grad, tensors,
            layouts, arguments, target,
        )
    return dq, dk, dv, dmask, dslopes, dtable, dlse


def blocks_of(
    arguments: AttentionArguments, terms: AttentionTerms, tokens: int, block: int, *, of_keys: bool
) -> tuple[torch.Tensor | None, int]:
    """Find (the work list of packed sequences or None, the number of blocks of each head)."""
    longest = arguments.max_keys if of_keys else arguments.max_queries
    starts, others = terms.starts_q, terms.starts_k
    if starts is None or others is None:
        return None, configs.ceil_div(longest, block) * arguments.sequences
    if of_keys:
        starts, others = others, starts
    last_first = terms.right is not None and not of_keys
    work = work_list(starts, others, tokens, longest, block, last_first)
    return work, work.shape[0]
