"""Scaled dot-product attention, forward.

    s = scale * q k^T + terms;  p = softmax(s);  o = dropout(p) v;  lse = log(sum(exp(s)))

With sinks, exp(sink) of the head is in that sum too, and nowhere else.

One program computes BLOCK_M queries of one head: it holds them in registers and walks the keys
in tiles of BLOCK_N with the online softmax, so that no [queries, keys] matrix is ever in memory.
Tiles that need no bounds or causal test run in a loop of their own; those that window, causality
or a boolean mask hide do not run at all. Reads q once and k, v once per block of queries; writes o
and two float32 per query for the backward, and lse if asked for. Few queries split the keys among
programs (attention_merge.py). Where a tuned table says so, forward_specialized.py has the kernel
that is launched in place of this one. Source: Dao, FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import (
    Sizes,
    attention_arguments,
    can_be_copied,
    layout_of,
)
from fusedformer_kernels.attention.mask_tiles import mask_tiles, tiles_of
from fusedformer_kernels.attention.merge import merge_splits
from fusedformer_kernels.attention.schedule import work_list
from fusedformer_kernels.attention.scores import (
    log_sum_exp,
    online_softmax_update,
    score_tile,
    sink_of,
    store_row_statistics,
    table_bias,
    with_sink,
)
from fusedformer_kernels.attention.terms import AttentionTerms, PositionTerms
from fusedformer_kernels.attention.tiles import (
    key_tiles_of_rows,
    load_tile,
    matrix_of,
    place_of,
    row_pointer,
    row_stride,
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
    kept_or_zero,
    store,
)
from fusedformer_kernels.runtime.steps import unplanned


@triton.jit
def _attend(
    q, acc, top, total, k_base, v_base, first, last, tiles, first_row, s, sizes, place,
    k_layout, v_layout, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, CHECKED: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, PIPELINED: tl.constexpr,
):
    """Online softmax over the tiles of keys from ``first`` to ``last``."""
    rows = first_row + tl.arange(0, q.shape[0])  # [BLOCK_M]
    # With two pipelined loops in a kernel ptxas serializes the tensor cores.
    for index in tl.range(first, last, num_stages=None if PIPELINED else 1):
        start, partial = tile_of(tiles, index, BLOCK_N)
        columns = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        k = load_tile(
            k_base, start, place.n_keys, k_layout, BLOCK_N, HEAD_DIM, BLOCK_D, not CHECKED
        )  # [BLOCK_N, BLOCK_D]
        scores = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        scores = dot(q, tl.trans(k), scores, PRECISION)  # [BLOCK_M, BLOCK_N]
        scores, _ = score_tile(
            scores, rows[:, None], columns[None, :], partial, s, sizes, place,
            table_bias(first_row, start, s, place, q.shape[0], BLOCK_N, False), CHECKED, SCALED,
        )
        weights, rescale, top, total = online_softmax_update(scores, top, total, s, SCALED)
        if s.seed is not None:
            keep = dropout_keep_tile(
                place.dropout_key, place.dropout_offset, first_row, start, s.p, q.shape[0], BLOCK_N
            )
            weights = kept_or_zero(keep, weights)
        v = load_tile(
            v_base, start, place.n_keys, v_layout, BLOCK_N, VALUE_DIM, BLOCK_DV, not CHECKED
        )  # [BLOCK_N, BLOCK_DV]
        acc = dot(cast(weights, v.dtype), v, acc * rescale[:, None], PRECISION)
    return acc, top, total


@triton.jit(do_not_specialize=COUNTS)
def _attention_forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, statistics_ptr, work_ptr, tiles, s, heads, queries, keys,
    in_sixteens, radius, q_layout, k_layout, v_layout, o_layout, lse_rows, plane, split_keys,
    o_split, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, ONE_LOOP: tl.constexpr,
):
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    sequence, head, block = which_block(
        work_ptr, sizes.heads, tl.cdiv(sizes.queries, BLOCK_M), s.right is not None
    )
    if work_ptr is not None:  # noqa: SIM102 (decided by the compiler, unlike the inner one)
        if sequence < 0:
            return
    place = place_of(s, sizes, sequence, head)
    k_base = matrix_of(k_ptr, k_layout, place.batch, place.key_head, place.k_start)
    v_base = matrix_of(v_ptr, v_layout, place.batch, place.key_head, place.k_start)
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q = load_tile(
        matrix_of(q_ptr, q_layout, place.batch, place.head, place.q_start), first_row,
        place.n_queries, q_layout, BLOCK_M, HEAD_DIM, BLOCK_D, False,
    )  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    first, full, last = key_tiles_of_rows(s, place, first_row, BLOCK_M, BLOCK_N)
    if split_keys is not None:
        per_split = split_keys // BLOCK_N
        first = tl.maximum(first, tl.program_id(1) * per_split)
        last = tl.minimum(last, (tl.program_id(1) + 1) * per_split)
    listed = None
    if tiles.entries is not None:
        listed, last = tiles_of(tiles, sequence, head, block)
        first = last * 0
    if ONE_LOOP:
        full = first
    else:
        acc, top, total = _attend(
            q, acc, top, total, k_base, v_base, first, full, listed, first_row, s, sizes, place,
            k_layout, v_layout, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, False, SCALED,
            PRECISION, True,
        )
    acc, top, total = _attend(
        q, acc, top, total, k_base, v_base, full, last, listed, first_row, s, sizes, place,
        k_layout, v_layout, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, True, SCALED,
        PRECISION, ONE_LOOP,
    )
    # A query with no visible key: total 0, output 0, log-sum-exp -inf.
    if s.sinks is not None and split_keys is None:
        sink = sink_of(s.sinks + place.head, SCALED)
        top, total, rescale = with_sink(top, total, sink, SCALED)
        o = acc * (rescale / tl.where(total == 0.0, 1.0, total))[:, None]
    else:
        o = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    if s.seed is not None:
        o *= dropout_scale(s.p)
    row_valid = rows < place.n_queries
    statistics = row_pointer(statistics_ptr, sizes, place, lse_rows)
    if split_keys is not None:  # attention_merge.py goes on with the sum itself
        part = tl.program_id(1).to(tl.int64)
        o_ptr += part * o_split
        statistics += part * 2 * plane
        tl.store(statistics + rows, top, mask=row_valid)
        tl.store(statistics + plane + rows, total, mask=row_valid)
    else:
        store_row_statistics(statistics, plane, rows, row_valid, top, total)
        if lse_ptr is not None:
            lse_rows_ptr = row_pointer(lse_ptr, sizes, place, lse_rows) + rows
            tl.store(lse_rows_ptr, log_sum_exp(top, total, SCALED), mask=row_valid)
    dims = tl.arange(0, BLOCK_DV)
    o_base = matrix_of(o_ptr, o_layout, place.batch, place.head, place.q_start)
    o_rows = o_base + rows * row_stride(o_layout)
    store(o_rows[:, None] + dims[None, :], o, row_valid[:, None] & (dims < VALUE_DIM)[None, :])


@planned
def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: AttentionTerms,
    return_lse: bool = False,
    positions: PositionTerms | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(output [B, H, L, Ev], log-sum-exp float32 [B, H, L] if asked for, statistics [2, B, H, L]).

    Of 4-D strided tensors. The statistics are for the backward and the weights, in the units of
    :mod:`scores`. The output lies in memory as [B, L, H, Ev]. ``key`` and ``value`` may
    have fewer heads. Packed tensors have B = 1 and all sequences' rows as L.
    """
    batch, heads, n_rows, _ = query.shape
    value_dim = value.shape[3]

    def new(*leading: int, dtype: torch.dtype) -> torch.Tensor:
        sizes = (*leading, batch, n_rows, heads, value_dim)
        return query.new_empty(sizes, dtype=dtype).transpose(-3, -2)

    output = new(dtype=query.dtype)
    lse = query.new_empty(batch, heads, n_rows, dtype=torch.float32) if return_lse else None
    statistics = query.new_empty(2, batch, heads, n_rows, dtype=torch.float32)
    if statistics.numel() == 0:
        return output, lse, statistics
    arguments = attention_arguments(query, key, value_dim, terms, positions)
    if arguments.sequences == 0 or arguments.max_queries == 0:
        unplanned()
        statistics[0] = -torch.inf
        statistics[1] = 1.0
        return output.zero_(), None if lse is None else lse.fill_(-torch.inf), statistics
    config = configs.attention_forward_config(
        arguments.kind, targets.target_of(query.device), arguments.max_queries,
        arguments.max_keys,
    )
    if config.specialized and not can_be_copied(query, key, value):
        config = configs.attention_forward_default(
            arguments.kind, targets.target_of(query.device)
        )
    splits = 1
    if config.keys_per_split and not arguments.lists_tiles:
        splits = max(1, targets.ceil_div(arguments.max_keys, config.keys_per_split))
    o_parts, statistics_parts = output, statistics
    if splits > 1:
        o_parts = new(splits, dtype=torch.float32)
        statistics_parts = statistics.new_empty(splits, *statistics.shape)
    work = None
    blocks = targets.ceil_div(arguments.max_queries, config.block_m) * arguments.sequences
    if terms.starts_q is not None and terms.starts_k is not None:
        work = work_list(
            terms.starts_q, terms.starts_k, n_rows, terms.max_queries, config.block_m,
            terms.right is not None,
        )
        blocks = work.shape[0]
    if config.specialized:
        from fusedformer_kernels.attention.forward_specialized import launch_specialized

        launch_specialized(
            (blocks * heads,), config, arguments, query, key, value, output, lse, statistics, work
        )
        return output, lse, statistics
    launch(
        _attention_forward, (blocks * heads, splits), config,
        query, key, value, o_parts, lse, statistics_parts, work,
        mask_tiles(arguments, config.block_m, config.block_n), arguments.scores, *arguments.sizes,
        layout_of(query), layout_of(key), layout_of(value), layout_of(o_parts), n_rows,
        batch * heads * n_rows, config.keys_per_split if splits > 1 else None, o_parts.stride(0),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        ONE_LOOP=config.one_loop or arguments.one_loop or splits > 1, **arguments.constants,
    )
    if splits > 1:
        scaled = bool(arguments.constants["SCALED"])
        merge_splits(
            o_parts, statistics_parts, output, lse, statistics, arguments.scores.sinks, scaled
        )
    return output, lse, statistics
