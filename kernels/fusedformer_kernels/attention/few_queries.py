"""Compute attention's backward where all queries of a head fit one tile, and the keys are many.

One program owns a block of keys (of all query heads that share it) and gives dk and dv whole, and
its part of dq in float32. A second kernel adds the parts up in the order of the keys: the same bits
every time. So there are as many programs as blocks of keys, and five products, where in backward.py
one program has all keys of a head's queries, and there are seven. Reads k and v once, and q and the
output's gradient once per block of keys. Writes dk and dv, and [queries, head_dim] floats for each
query head and block of keys: no more bytes than the keys have, see ``configs``.
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
    layout_of,
)
from fusedformer_kernels.attention.schedule import first_tile, tiles_of_all
from fusedformer_kernels.attention.scores import load_row_terms, score_gradients
from fusedformer_kernels.attention.tiles import (
    key_rows,
    key_tiles_of_rows,
    keys_of,
    load_pair,
    matrix_of,
    place_of,
    query_rows,
    row_pointer,
    store_rows,
    which_block,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    cast,
    dot,
    dropout_keep_tile,
    dropout_scale,
    once_each,
)


@triton.jit
def _part_rows(parts_ptr, s, sizes, place, sequence, block, max_queries, BLOCK_N, HEAD_DIM):
    """Point to the part [max_queries, HEAD_DIM] that a block of keys has of a head's dq."""
    first = first_tile(
        s.starts_k, place.k_start, place.batch, sequence, keys_of(sizes), BLOCK_N
    )
    return parts_ptr + ((first + block) * sizes.heads + place.head) * max_queries * HEAD_DIM


@triton.jit(do_not_specialize=COUNTS)
def _few_queries_backward(
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, delta_ptr, given, parts_ptr, dk_ptr, dv_ptr,
    work_ptr, s, heads, queries, keys, in_sixteens, radius, q_layout, k_layout, v_layout,
    grad_layout, dk_layout, dv_layout, lse_rows, plane, max_queries, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Write dk and dv of a block of keys, and parts of dq; a pointer of None asks for none."""
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    key_heads = sizes.heads // s.group
    sequence, key_head, block = which_block(
        work_ptr, key_heads, tl.cdiv(keys_of(sizes), BLOCK_N), False
    )
    if work_ptr is not None:  # noqa: SIM102 (decided by the compiler, unlike the inner one)
        if sequence < 0:
            return
    place = place_of(s, sizes, sequence, key_head * s.group)
    first, _full, last = key_tiles_of_rows(s, place, 0, BLOCK_M, BLOCK_N)
    members = tl.where((block >= first) & (block < last), s.group, 0)
    first_column = block * BLOCK_N
    k, v = load_pair(
        key_rows(k_ptr, k_layout, place), key_rows(v_ptr, v_layout, place), first_column,
        place.n_keys, k_layout, v_layout, BLOCK_N, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, False,
    )  # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, members):
        place = place_of(s, sizes, sequence, key_head * s.group + member)
        q, grad = load_pair(
            query_rows(q_ptr, q_layout, place), query_rows(grad_ptr, grad_layout, place), 0,
            place.n_queries, q_layout, grad_layout, BLOCK_M, HEAD_DIM, VALUE_DIM, BLOCK_D,
            BLOCK_DV, False,
        )  # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
        row_base = row_pointer(statistics_ptr, sizes, place, lse_rows)
        delta_base = row_pointer(delta_ptr, sizes, place, lse_rows)
        terms = load_row_terms(row_base, plane, delta_base, rows, place.n_queries, SCALED)
        _dscores, dproduct, weights = score_gradients(
            q, grad, k, v, terms, 0, first_column, True, given, s, sizes, place, BLOCK_N, True,
            SCALED, PRECISION,
        )  # [BLOCK_M, BLOCK_N]
        dproduct = cast(dproduct, k.dtype)
        if dv_ptr is not None:
            weights *= terms[1][:, None]
            if s.seed is not None:  # the draw of score_gradients, which the compiler makes once
                keep = dropout_keep_tile(
                    place.dropout_key, place.dropout_offset, 0, first_column, s.p, BLOCK_M, BLOCK_N
                )
                weights = tl.where(keep, weights * dropout_scale(s.p), 0.0)
            weights = tl.trans(cast(weights, grad.dtype))
            if s.seed is not None:
                weights = once_each(weights)
            dv = dot(weights, grad, dv, PRECISION)
        if dk_ptr is not None:
            gradients = tl.trans(dproduct)
            if s.seed is not None:
                gradients = once_each(gradients)
            dk = dot(gradients, q, dk, PRECISION)
        if parts_ptr is not None:
            if s.seed is not None:
                dproduct = once_each(dproduct)
            part = dot(dproduct, k, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), PRECISION)
            part_rows = _part_rows(
                parts_ptr, s, sizes, place, sequence, block, max_queries, BLOCK_N, HEAD_DIM
            )
            pointers = part_rows + (rows * HEAD_DIM)[:, None] + dims[None, :]
            valid = (rows < place.n_queries)[:, None] & (dims < HEAD_DIM)[None, :]
            tl.store(pointers, part, mask=valid)
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    stored = columns < place.stored_keys
    visible = (columns < place.n_keys)[:, None]
    if dk_ptr is not None:
        dk = tl.where(visible, dk * s.scale, 0.0)
        dk_base = matrix_of(dk_ptr, dk_layout, place.batch, place.key_head, place.k_start)
        store_rows(dk_base, dk_layout, columns, stored, dk, HEAD_DIM, BLOCK_D)
    if dv_ptr is not None:
        dv = tl.where(visible, dv, 0.0)
        dv_base = matrix_of(dv_ptr, dv_layout, place.batch, place.key_head, place.k_start)
        store_rows(dv_base, dv_layout, columns, stored, dv, VALUE_DIM, BLOCK_DV)


@triton.jit(do_not_specialize=COUNTS)
def _sum_query_parts(
    parts_ptr, dq_ptr, s, heads, queries, keys, in_sixteens, radius, dq_layout, max_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write a row of dq: the sum of its parts, BLOCK_P blocks of keys at a time."""
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    row = tl.program_id(0) % max_queries
    plane = tl.program_id(0) // max_queries
    sequence = plane // sizes.heads
    place = place_of(s, sizes, sequence, plane % sizes.heads)
    if row >= place.n_queries:
        return
    first, _full, last = key_tiles_of_rows(s, place, 0, BLOCK_M, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    block_stride = sizes.heads.to(tl.int64) * max_queries * HEAD_DIM
    base = _part_rows(parts_ptr, s, sizes, place, sequence, 0, max_queries, BLOCK_N, HEAD_DIM)
    base += row * HEAD_DIM
    for start in range(first, last, BLOCK_P):
        blocks = start + tl.arange(0, BLOCK_P)
        pointers = base + (blocks * block_stride)[:, None] + dims[None, :]
        valid = (blocks < last)[:, None] & (dims < HEAD_DIM)[None, :]
        total += tl.sum(tl.load(pointers, mask=valid, other=0.0), 0)
    dq_base = query_rows(dq_ptr, dq_layout, place)
    rows = row + tl.arange(0, 1)
    store_rows(
        dq_base, dq_layout, rows, rows >= 0, (total * s.scale)[None, :], HEAD_DIM, BLOCK_D
    )


def few_queries_backward(
    tensors: tuple[Any, ...],
    layouts: tuple[Layout, ...],
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    work: torch.Tensor | None,
    blocks: int,
    arguments: AttentionArguments,
    config: configs.AttentionConfig,
) -> None:
    """Fill ``dq``, ``dk`` and ``dv``; None is not needed.

    ``tensors`` and ``layouts`` are those of the other backward kernels; ``work`` and ``blocks``
    those of a kernel that owns blocks of keys.
    """
    query, key, statistics = tensors[0], tensors[1], tensors[4]
    heads, n_rows, dim = query.shape[1:]
    parts = None
    if dq is not None:
        count = tiles_of_all(arguments, key.shape[2], config.block_n)
        sizes = (count, heads, arguments.max_queries, dim)
        parts = torch.empty(sizes, dtype=torch.float32, device=query.device)
    launch(
        _few_queries_backward, (blocks * key.shape[1],), config, *tensors, parts, dk, dv, work,
        arguments.scores, *arguments.sizes, *layouts, layout_of(dk), layout_of(dv), n_rows,
        statistics[0].numel(), arguments.max_queries, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, **arguments.constants,
    )
    if parts is not None and dq is not None:
        block_d = arguments.constants["BLOCK_D"]
        launch(
            _sum_query_parts, (arguments.sequences * heads * arguments.max_queries,),
            targets.LaunchConfig(8, 2), parts, dq, arguments.scores, *arguments.sizes,
            layout_of(dq), arguments.max_queries, HEAD_DIM=dim, BLOCK_D=block_d,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_P=max(8192 // block_d, 16),
        )
