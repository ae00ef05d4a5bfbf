"""Compute the gradient of attention's table of relative biases.

    dtable[r] = sum of ds, times the query's gate, where clamp(distance) = r

One program owns a share of the diagonals of square score tiles of one head of one sequence. Tiles
of a diagonal have the same distances, so their score gradients are added up element by element, and
the bias is loaded once for all of them. At a diagonal's end that sum is summed along its distances:
rows are shifted against each other, and the columns of the shifted tile added up. Those sums, of
which there are two for each distance and head, are added up in a fixed order by two short kernels:
no atomics. Scores are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import AttentionArguments, Layout, Sizes
from fusedformer_kernels.attention.scores import gates, load_row_terms, score_gradients, table_bias
from fusedformer_kernels.attention.tiles import (
    key_rows,
    load_pair,
    place_of,
    query_rows,
    row_pointer,
)
from fusedformer_kernels.rows.reduction import sum_partials
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS
from fusedformer_kernels.runtime.steps import unplanned

_CHUNK = 128  # entries of the table that a program adds up


@triton.jit
def _diagonal_sums(tile, first, BLOCK: tl.constexpr):
    """Sum a [BLOCK, BLOCK] tile along BLOCK diagonals ``column - row``, from ``first`` on."""
    rows = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :] + rows + first  # of the tile, for each sum
    inside = (column >= 0) & (column < BLOCK)
    shifted = tl.gather(tile, tl.where(inside, column, 0), 1)
    return tl.sum(tl.where(inside, shifted, 0.0), 0)


@triton.jit(do_not_specialize=COUNTS)
def _attention_table_gradient(
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, delta_ptr, given, sums_ptr, s, heads, queries,
    keys, in_sixteens, radius, q_layout, k_layout, v_layout, grad_layout, lse_rows, plane, shares,
    diagonals, last_block, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Write ``sums`` [sequences, heads, diagonals, 2 * BLOCK], the last of which is not used."""
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
    # What all diagonals share would take registers of the inner loop, were it worked out before.
    for index in tl.range(share, diagonals, shares, disable_licm=True):
        diagonal = index - last_block  # block of keys less block of queries
        nearest = diagonal * BLOCK - place.offset  # distances are less than BLOCK from it
        first = tl.maximum(-diagonal, 0)
        last = tl.cdiv(place.n_keys, BLOCK) - diagonal
        last = tl.minimum(tl.cdiv(place.n_queries, BLOCK), last)
        if s.right is not None:
            last = tl.where(nearest - BLOCK < s.right, last, first)
        if s.left is not None:
            last = tl.where(nearest + BLOCK > -s.left, last, first)
        bias = None
        if BLOCK_D <= 128:  # there are registers for it
            bias = table_bias(0, diagonal * BLOCK, s, place, BLOCK, BLOCK, False)
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for block in tl.range(first, last, disable_licm=True):
            first_row = block * BLOCK
            start = (block + diagonal) * BLOCK
            q, grad = load_pair(
                q_base, grad_base, first_row, place.n_queries, q_layout, grad_layout, BLOCK,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, False,
            )  # [BLOCK, BLOCK_D], [BLOCK, BLOCK_DV]
            terms = load_row_terms(
                row_base, plane, delta_base, first_row + tl.arange(0, BLOCK), place.n_queries,
                SCALED,
            )
            k, v = load_pair(
                k_base, v_base, start, place.n_keys, k_layout, v_layout, BLOCK, HEAD_DIM,
                VALUE_DIM, BLOCK_D, BLOCK_DV, False,
            )  # [BLOCK, BLOCK_D], [BLOCK, BLOCK_DV]
            dscores, _product, _weights = score_gradients(
                q, grad, k, v, terms, first_row, start, True, given, s, sizes, place, BLOCK, True,
                SCALED, PRECISION, table_tile=bias,
            )
            if s.gate is not None:
                rows = first_row + tl.arange(0, BLOCK)
                dscores *= gates(rows[:, None], s, place)
            total += dscores
        at = (pid // shares).to(tl.int64) * diagonals + index
        sums = sums_ptr + at * (2 * BLOCK)
        if tl.abs(nearest) - BLOCK >= sizes.radius - 1:  # all are beyond one of the table's ends
            tl.store(sums + tl.arange(0, BLOCK), tl.sum(total, 1))
            tl.store(sums + BLOCK + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))
        else:
            for half in range(2):  # not unrolled: indices of both would take registers
                shifted = _diagonal_sums(total, half * BLOCK + (1 - BLOCK), BLOCK)
                tl.store(sums + half * BLOCK + tl.arange(0, BLOCK), shifted)


@triton.jit
def _sums_at(sums, place, diagonals, last_block, BLOCK: tl.constexpr, distance, wanted):
    """Load the sum of ds for each distance that is wanted, else 0: those of two diagonals."""
    position = distance + place.offset + ((last_block + 1) * BLOCK - 1)
    wanted &= (position >= 0) & (position < (diagonals + 1) * BLOCK)
    pointers = sums + position // BLOCK * (2 * BLOCK) + position % BLOCK
    found = tl.load(pointers, mask=wanted & (position < diagonals * BLOCK), other=0.0)
    return found + tl.load(pointers - BLOCK, mask=wanted & (position >= BLOCK), other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def _sum_diagonals(
    sums_ptr, dtable_ptr, s, heads, queries, keys, in_sixteens, radius, diagonals, last_block,
    chunks, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):
    """Write ``dtable`` [sequences, heads, 2 * radius + 1] from what the diagonals gave."""
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    pid = tl.program_id(0)
    chunk = pid % chunks
    plane = (pid // chunks).to(tl.int64)
    place = place_of(s, sizes, pid // chunks // heads, pid // chunks % heads)
    sums = sums_ptr + plane * diagonals * (2 * BLOCK)
    entry = chunk * CHUNK + tl.arange(0, CHUNK)
    distance = entry - radius
    inner = (distance > -radius) & (distance < radius)
    found = _sums_at(sums, place, diagonals, last_block, BLOCK, distance, inner)
    least = (1 - BLOCK) - last_block * BLOCK - place.offset
    below = tl.zeros([CHUNK], tl.float32)  # at or beyond the table's two ends
    above = tl.zeros([CHUNK], tl.float32)
    if chunk == 0:
        for first in range(least, 1 - radius, CHUNK):
            distance = first + tl.arange(0, CHUNK)
            wanted = distance <= -radius
            below += _sums_at(sums, place, diagonals, last_block, BLOCK, distance, wanted)
    if chunk == chunks - 1:
        for first in range(tl.maximum(radius, 1 - radius), least + (diagonals + 1) * BLOCK, CHUNK):
            distance = first + tl.arange(0, CHUNK)
            wanted = distance > -radius
            above += _sums_at(sums, place, diagonals, last_block, BLOCK, distance, wanted)
    found += tl.where(entry == 0, tl.sum(below, 0), 0.0)
    found += tl.where(entry == 2 * radius, tl.sum(above, 0), 0.0)
    width = 2 * radius + 1
    tl.store(dtable_ptr + plane * width + entry, found, mask=entry < width)


def attention_table_gradient(
    table: torch.Tensor,
    tensors: tuple[Any, ...],
    layouts: tuple[Layout, ...],
    arguments: AttentionArguments,
    target: targets.Target,
) -> torch.Tensor:
    """Compute the gradient of ``table`` [1 or H, 2R + 1], in its dtype.

    ``tensors`` and ``layouts`` are those that the other backward kernels get.
    """
    unplanned()  # the sum is cast
    simple = arguments.scores.mask is None and arguments.n_features == 0
    config = configs.attention_table_gradient_config(arguments.kind, target, simple)
    sequences, heads, width = arguments.sequences, arguments.sizes.heads, table.shape[1]
    last_block = targets.ceil_div(arguments.max_queries, config.block_m) - 1
    diagonals = last_block + targets.ceil_div(arguments.max_keys, config.block_m)
    # Diagonals differ in length: several programs a slot even that out.
    shares = min(diagonals, targets.ceil_div(8 * target.multiprocessors, sequences * heads))
    sums = table.new_empty((sequences, heads, diagonals, 2 * config.block_m), dtype=torch.float32)
    launch(
        _attention_table_gradient, (sequences * heads * shares,), config, *tensors, sums,
        arguments.scores, *arguments.sizes, *layouts, tensors[0].shape[2], tensors[4][0].numel(),
        shares, diagonals, last_block, BLOCK=config.block_m, **arguments.constants,
    )
    partials = table.new_empty((sequences, heads, width), dtype=torch.float32)
    chunks = targets.ceil_div(width, _CHUNK)
    launch(
        _sum_diagonals, (sequences * heads * chunks,), targets.LaunchConfig(4, 2), sums, partials,
        arguments.scores, *arguments.sizes, diagonals, last_block, chunks, BLOCK=config.block_m,
        CHUNK=_CHUNK,
    )
    dtable = sum_partials(partials.view(-1, table.numel()))
    return dtable.view(table.shape).to(table.dtype)
