"""Compute gradients of attention's terms by distance: ALiBi slopes, table of relative biases.

    dslope = -sum(ds * abs(distance));  dtable[r] = sum of ds where clamp(distance) = r

One program owns a share of the row blocks of one head of one sequence, walks the keys, and leaves
partial sums in a row of its own: no atomics. To sum a tile along its diagonals, rows are shifted
against each other, and the columns of the shifted tile added up. The ds of a row add up to the
gradient of its lse (and what a sink takes) but for the rounding of delta, which distances would
magnify: the slopes' sums are freed of it. Scores are recomputed; memory is one table per program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import AttentionArguments, Layout, Sizes
from fusedformer_kernels.attention.tiles import (
    key_rows,
    key_tiles_of_rows,
    load_pair,
    load_row_terms,
    load_strided_rows,
    place_of,
    query_rows,
    row_pointer,
    score_gradients,
    sink_of,
    taken_by_sink,
)
from fusedformer_kernels.rows.reduction import sum_partials
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS
from fusedformer_kernels.runtime.steps import unplanned


@triton.jit
def diagonal_sums(tile, first, BLOCK: tl.constexpr):
    """Sum a [BLOCK, BLOCK] tile along BLOCK diagonals ``column - row``, from ``first`` on."""
    rows = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :] + rows + first  # of the tile, for each sum
    inside = (column >= 0) & (column < BLOCK)
    shifted = tl.gather(tile, tl.where(inside, column, 0), 1)
    return tl.sum(tl.where(inside, shifted, 0.0), 0)


@triton.jit(do_not_specialize=COUNTS)
def _attention_position_gradients(
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, delta_ptr, given, lse_grad_ptr, dslope_ptr,
    dtable_ptr, s, heads, queries, keys, in_sixteens, radius, q_layout, k_layout, v_layout,
    grad_layout, lse_grad_strides, lse_rows, plane, shares, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Write ``dslope`` [sequences, shares, heads]; add to ``dtable`` [..., 2 * radius + 1]."""
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    pid = tl.program_id(0)
    share = pid % shares
    sequence, head = pid // shares // sizes.heads, pid // shares % sizes.heads
    place = place_of(s, sizes, sequence, head)
    q_base = query_rows(q_ptr, q_layout, place)
    grad_base = query_rows(grad_ptr, grad_layout, place)
    k_base = key_rows(k_ptr, k_layout, place)
    v_base = key_rows(v_ptr, v_layout, place)  # Triton 3.6 unpacks no tuple with None
    row_base = row_pointer(statistics_ptr, sizes, place, lse_rows)
    delta_base = row_pointer(delta_ptr, sizes, place, lse_rows)
    partial_row = (sequence * shares + share).to(tl.int64) * sizes.heads + head
    slope_sum = tl.zeros([BLOCK], tl.float32)
    below = tl.zeros([BLOCK], tl.float32)  # at or beyond the table's two ends
    above = tl.zeros([BLOCK], tl.float32)
    for block in range(share, tl.cdiv(place.n_queries, BLOCK), shares):
        first_row = block * BLOCK
        rows = first_row + tl.arange(0, BLOCK)  # [BLOCK]
        q, grad = load_pair(
            q_base, grad_base, first_row, place.n_queries, q_layout, grad_layout, BLOCK, HEAD_DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, False,
        )  # [BLOCK, BLOCK_D], [BLOCK, BLOCK_DV]
        terms = load_row_terms(row_base, plane, delta_base, rows, place.n_queries, SCALED)
        far = tl.zeros([BLOCK], tl.float32)  # rowsum(ds * distance)
        excess = tl.zeros([BLOCK], tl.float32)  # rowsum(ds) less what it should be
        mean = tl.zeros([BLOCK], tl.float32)  # rowsum(p * distance), before it is normalized
        if lse_grad_ptr is not None:
            excess -= load_strided_rows(
                lse_grad_ptr, lse_grad_strides, place.batch, place.head, place.q_start + rows,
                rows < place.n_queries,
            )
        if s.sinks is not None and given.pointer is None:
            excess -= taken_by_sink(sink_of(s.sinks + place.head, SCALED), terms, SCALED)
        first, _full, last = key_tiles_of_rows(s, place, first_row, BLOCK, BLOCK)
        # Not pipelined: no load may be moved before the store of the tile before it.
        for index in tl.range(first, last, num_stages=1):
            start = index * BLOCK
            k, v = load_pair(
                k_base, v_base, start, place.n_keys, k_layout, v_layout, BLOCK, HEAD_DIM,
                VALUE_DIM, BLOCK_D, BLOCK_DV, False,
            )  # [BLOCK, BLOCK_D], [BLOCK, BLOCK_DV]
            dscores, _product, weights = score_gradients(
                q, grad, k, v, terms, first_row, start, True, given, s, sizes, place, BLOCK, True,
                SCALED, PRECISION,
            )
            if dslope_ptr is not None:
                columns = start + tl.arange(0, BLOCK)
                distance = tl.abs(columns[None, :] - rows[:, None] - place.offset).to(tl.float32)
                far += tl.sum(dscores * distance, 1)
                excess += tl.sum(dscores, 1)
                mean += tl.sum(weights * distance, 1)
            if dtable_ptr is not None:
                row = dtable_ptr + partial_row * (2 * sizes.radius + 1) + sizes.radius
                for half in tl.static_range(2):
                    diagonal = half * BLOCK + (1 - BLOCK)
                    sums = diagonal_sums(dscores, diagonal, BLOCK)
                    distance = start - first_row - place.offset + diagonal + tl.arange(0, BLOCK)
                    below += tl.where(distance <= -sizes.radius, sums, 0.0)
                    inner = distance > -sizes.radius
                    above += tl.where((distance >= sizes.radius) & inner, sums, 0.0)
                    within = inner & (distance < sizes.radius)
                    # Another thread may have written what this one reads.
                    tl.debug_barrier()
                    sums += tl.load(row + distance, mask=within, other=0.0)
                    tl.debug_barrier()
                    tl.store(row + distance, sums, mask=within)
        if given.pointer is None:
            far -= mean * terms[1] * excess
        slope_sum -= far
    if dslope_ptr is not None:
        tl.store(dslope_ptr + partial_row, tl.sum(slope_sum, 0))
    if dtable_ptr is not None:
        row = dtable_ptr + partial_row * (2 * sizes.radius + 1)
        if sizes.radius == 0:  # one entry is both ends
            below += above
        else:
            tl.store(row + 2 * sizes.radius, tl.sum(above, 0))
        tl.store(row, tl.sum(below, 0))


def attention_position_gradients(
    slopes: torch.Tensor | None,
    table: torch.Tensor | None,
    lse_grad: torch.Tensor | None,
    tensors: tuple[Any, ...],
    layouts: tuple[Layout, ...],
    arguments: AttentionArguments,
    target: targets.Target,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Compute gradients of ``slopes`` [1 or B, H] and ``table`` [1 or H, 2R + 1]; None for None.

    ``tensors`` and ``layouts`` are those that the other backward kernels get.
    """
    if slopes is not None and table is not None:  # a pass each: together they spill registers
        rest = (lse_grad, tensors, layouts, arguments, target)
        dslopes, _ = attention_position_gradients(slopes, None, *rest)
        return dslopes, attention_position_gradients(None, table, *rest)[1]
    unplanned()  # sums are zeroed first, and cast
    config = configs.attention_mask_gradient_config(arguments.kind, target)
    sequences, heads = arguments.sequences, arguments.sizes.heads
    blocks = targets.ceil_div(arguments.max_queries, config.block_m)
    shares = min(blocks, targets.ceil_div(2 * target.multiprocessors, sequences * heads))
    device = tensors[0].device
    sizes = (sequences, shares, heads)
    dslopes, dtable = None, None
    if slopes is not None:
        dslopes = torch.empty(sizes, dtype=torch.float32, device=device)
    if table is not None:
        dtable = torch.zeros((*sizes, table.shape[1]), dtype=torch.float32, device=device)
    launch(
        _attention_position_gradients, (sequences * shares * heads,), config, *tensors, lse_grad,
        dslopes, dtable, arguments.scores, *arguments.sizes, *layouts,
        (0, 0, 0) if lse_grad is None else lse_grad.stride(), tensors[0].shape[2],
        tensors[4][0].numel(), shares,
        BLOCK=config.block_m, **arguments.constants,
    )
    if dslopes is not None and slopes is not None:
        if slopes.shape[0] == 1:
            dslopes = sum_partials(dslopes.view(sequences * shares, heads))[None]
        else:
            by_share = dslopes.transpose(0, 1).reshape(shares, sequences * heads)
            dslopes = sum_partials(by_share).view(sequences, heads)
        dslopes = dslopes.to(slopes.dtype)
    if dtable is not None and table is not None:
        width = table.shape[1]
        if table.shape[0] == heads:
            dtable = sum_partials(dtable.view(sequences * shares, heads * width))
        else:
            dtable = sum_partials(dtable.view(sequences * shares * heads, width))
        dtable = dtable.view(table.shape).to(table.dtype)
    return dslopes, dtable
