"""Compute the gradient of the gate of attention's relative biases.

    dgate[query] = sum of ds * table[distance] over the keys

One program owns a block of queries of one head of one sequence and walks the keys. Scores are
recomputed. Writes one number a query.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import AttentionArguments, Layout, Sizes
from fusedformer_kernels.attention.schedule import blocks_of
from fusedformer_kernels.attention.scores import load_row_terms
from fusedformer_kernels.attention.slope_gradient import weighted_row_sums
from fusedformer_kernels.attention.terms import AttentionTerms
from fusedformer_kernels.attention.tiles import (
    key_rows,
    load_pair,
    place_of,
    query_rows,
    row_pointer,
    which_block,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS, store


@triton.jit(do_not_specialize=COUNTS)
def _attention_gate_gradient(
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, delta_ptr, given, lse_grad_ptr, dgate_ptr,
    work_ptr, s, heads, queries, keys, in_sixteens, radius, q_layout, k_layout, v_layout,
    grad_layout, lse_grad_strides, lse_rows, plane, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Write ``dgate`` [batch, heads, queries] of a block of queries."""
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    sequence, head, block = which_block(
        work_ptr, sizes.heads, tl.cdiv(sizes.queries, BLOCK), s.right is not None
    )
    if work_ptr is not None:  # noqa: SIM102 (decided by the compiler, unlike the inner one)
        if sequence < 0:
            return
    place = place_of(s, sizes, sequence, head)
    first_row = block * BLOCK
    rows = first_row + tl.arange(0, BLOCK)  # [BLOCK]
    q, grad = load_pair(
        query_rows(q_ptr, q_layout, place), query_rows(grad_ptr, grad_layout, place), first_row,
        place.n_queries, q_layout, grad_layout, BLOCK, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
        False,
    )  # [BLOCK, BLOCK_D], [BLOCK, BLOCK_DV]
    k_base = key_rows(k_ptr, k_layout, place)
    v_base = key_rows(v_ptr, v_layout, place)  # Triton 3.6 unpacks no tuple with None
    row_base = row_pointer(statistics_ptr, sizes, place, lse_rows)
    delta_base = row_pointer(delta_ptr, sizes, place, lse_rows)
    terms = load_row_terms(row_base, plane, delta_base, rows, place.n_queries, SCALED)
    dgate = weighted_row_sums(
        q, grad, terms, k_base, v_base, first_row, given, lse_grad_ptr, lse_grad_strides, s, sizes,
        place, k_layout, v_layout, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK, SCALED,
        PRECISION, True,
    )
    dgate_rows = row_pointer(dgate_ptr, sizes, place, lse_rows)
    store(dgate_rows + rows, dgate, rows < place.n_queries)


def attention_gate_gradient(
    gate: torch.Tensor,
    lse_grad: torch.Tensor | None,
    tensors: tuple[Any, ...],
    layouts: tuple[Layout, ...],
    arguments: AttentionArguments,
    terms: AttentionTerms,
    target: targets.Target,
) -> torch.Tensor:
    """Compute the gradient of ``gate`` [B, H, L], in its dtype.

    ``tensors`` and ``layouts`` are those that the other backward kernels get.
    """
    config = configs.attention_term_gradient_config(arguments.kind, target)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    n_rows = gate.shape[2]
    work, blocks = blocks_of(arguments, terms, n_rows, config.block_m, of_keys=False)
    launch(
        _attention_gate_gradient, (blocks * gate.shape[1],), config, *tensors, lse_grad, dgate,
        work, arguments.scores, *arguments.sizes, *layouts,
        (0, 0, 0) if lse_grad is None else lse_grad.stride(), n_rows, tensors[4][0].numel(),
        BLOCK=config.block_m, **arguments.constants,
    )
    return dgate
