"""Compute the gradient of attention's ALiBi slopes.

    dslope = -sum(ds * abs(distance))

One program owns a share of the row blocks of one head of one sequence, walks the keys, and leaves
a partial sum of its own: no atomics. Scores are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import AttentionArguments, Layout, Sizes
from fusedformer_kernels.attention.scores import (
    load_row_terms,
    score_gradients,
    sink_of,
    table_bias,
    taken_by_sink,
)
from fusedformer_kernels.attention.tiles import (
    key_rows,
    key_tiles_of_rows,
    load_pair,
    load_strided_rows,
    place_of,
    query_rows,
    row_pointer,
)
from fusedformer_kernels.rows.reduction import sum_partials
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS
from fusedformer_kernels.runtime.steps import unplanned


@triton.jit
def weighted_row_sums(
    q, grad, terms, k_base, v_base, first_row, given, lse_grad_ptr, lse_grad_strides, s, sizes,
    place, k_layout, v_layout, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, BY_TABLE: tl.constexpr,
):
    """Compute rowsum(ds * w) of a block of queries: w is abs(distance), or the table's entry.

    The ds of a row add up to the gradient of its lse (and what a sink takes) but for the rounding
    of delta, which w would magnify: the sums are freed of it.
    """
    rows = first_row + tl.arange(0, BLOCK)  # [BLOCK]
    far = tl.zeros([BLOCK], tl.float32)  # rowsum(ds * w)
    excess = tl.zeros([BLOCK], tl.float32)  # rowsum(ds) less what it should be
    mean = tl.zeros([BLOCK], tl.float32)  # rowsum(p * w), before it is normalized
    if lse_grad_ptr is not None:
        excess -= load_strided_rows(
            lse_grad_ptr, lse_grad_strides, place.batch, place.head, place.q_start + rows,
            rows < place.n_queries,
        )
    if s.sinks is not None and given.pointer is None:
        excess -= taken_by_sink(sink_of(s.sinks + place.head, SCALED), terms, SCALED)
    first, _full, last = key_tiles_of_rows(s, place, first_row, BLOCK, BLOCK)
    for index in tl.range(first, last, num_stages=1):
        start = index * BLOCK
        k, v = load_pair(
            k_base, v_base, start, place.n_keys, k_layout, v_layout, BLOCK, HEAD_DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, False,
        )  # [BLOCK, BLOCK_D], [BLOCK, BLOCK_DV]
        columns = start + tl.arange(0, BLOCK)
        bias = None
        if BY_TABLE:
            bias = table_bias(first_row, start, s, place, BLOCK, BLOCK, False)
        dscores, _product, weights = score_gradients(
            q, grad, k, v, terms, first_row, start, True, given, s, sizes, place, BLOCK, True,
            SCALED, PRECISION, table_tile=bias,
        )
        factor = bias
        if not BY_TABLE:
            distances = columns[None, :] - rows[:, None] - place.offset
            factor = tl.abs(distances).to(tl.float32)
        far += tl.sum(dscores * factor, 1)
        excess += tl.sum(dscores, 1)
        mean += tl.sum(weights * factor, 1)
    if given.pointer is None:
        far -= mean * terms[1] * excess
    return far


@triton.jit(do_not_specialize=COUNTS)
def _attention_slope_gradient(
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, delta_ptr, given, lse_grad_ptr, dslope_ptr,
    s, heads, queries, keys, in_sixteens, radius, q_layout, k_layout, v_layout,
    grad_layout, lse_grad_strides, lse_rows, plane, shares, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Write ``dslope`` [sequences, shares, heads]."""
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
    # What all blocks share would take registers of the inner loop, were it worked out before.
    for block in tl.range(share, tl.cdiv(place.n_queries, BLOCK), shares, disable_licm=True):
        first_row = block * BLOCK
        rows = first_row + tl.arange(0, BLOCK)  # [BLOCK]
        q, grad = load_pair(
            q_base, grad_base, first_row, place.n_queries, q_layout, grad_layout, BLOCK, HEAD_DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, False,
        )  # [BLOCK, BLOCK_D], [BLOCK, BLOCK_DV]
        terms = load_row_terms(row_base, plane, delta_base, rows, place.n_queries, SCALED)
        slope_sum -= weighted_row_sums(
            q, grad, terms, k_base, v_base, first_row, given, lse_grad_ptr, lse_grad_strides, s,
            sizes, place, k_layout, v_layout, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK,
            SCALED, PRECISION, False,
        )
    tl.store(dslope_ptr + partial_row, tl.sum(slope_sum, 0))


def attention_slope_gradient(
    slopes: torch.Tensor,
    lse_grad: torch.Tensor | None,
    tensors: tuple[Any, ...],
    layouts: tuple[Layout, ...],
    arguments: AttentionArguments,
    target: targets.Target,
) -> torch.Tensor:
    """Compute the gradient of ``slopes`` [1 or B, H], in their dtype.

    ``tensors`` and ``layouts`` are those that the other backward kernels get.
    """
    unplanned()  # sums are cast
    config = configs.attention_term_gradient_config(arguments.kind, target)
    sequences, heads = arguments.sequences, arguments.sizes.heads
    blocks = targets.ceil_div(arguments.max_queries, config.block_m)
    shares = min(blocks, targets.ceil_div(2 * target.multiprocessors, sequences * heads))
    sizes = (sequences, shares, heads)
    dslopes = torch.empty(sizes, dtype=torch.float32, device=slopes.device)
    launch(
        _attention_slope_gradient, (sequences * shares * heads,), config, *tensors, lse_grad,
        dslopes, arguments.scores, *arguments.sizes, *layouts,
        (0, 0, 0) if lse_grad is None else lse_grad.stride(), tensors[0].shape[2],
        tensors[4][0].numel(), shares,
        BLOCK=config.block_m, **arguments.constants,
    )
    if slopes.shape[0] == 1:
        dslopes = sum_partials(dslopes.view(sequences * shares, heads))[None]
    else:
        by_share = dslopes.transpose(0, 1).reshape(shares, sequences * heads)
        dslopes = sum_partials(by_share).view(sequences, heads)
    return dslopes.to(slopes.dtype)
