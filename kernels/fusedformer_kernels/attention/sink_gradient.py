"""Compute the gradient of the attention sinks from statistics that the backward has anyhow.

    dsink = -sum(p_sink * delta),  p_sink = exp(sink - top) / sum

over the queries of a head, of all sequences: the value of a sink is 0, so that its weight takes
from the others alone. One program owns a share of the row blocks of one head and leaves a partial
sum: no atomics. Reads three float32 a query. Source: transformers' ``s_aux``; arXiv:2508.10925.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention.arguments import scores_are_scaled
from fusedformer_kernels.attention.scores import load_row_terms, sink_of, taken_by_sink
from fusedformer_kernels.attention.terms import AttentionTerms
from fusedformer_kernels.rows.reduction import sum_partials
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS
from fusedformer_kernels.runtime.steps import unplanned
from fusedformer_kernels.runtime.strided import contiguous_vector

BLOCK = 1024


@triton.jit(do_not_specialize=COUNTS)
def _attention_sink_gradient(
    sinks_ptr, statistics_ptr, delta_ptr, end_ptr, partials_ptr, heads, n_rows, n_sequences, plane,
    shares, BLOCK: tl.constexpr, SCALED: tl.constexpr,
):
    """Write ``partials`` [shares, heads]; packed rows from ``end`` on belong to no sequence."""
    head = tl.program_id(0) % heads
    share = tl.program_id(0) // heads
    sink = sink_of(sinks_ptr + head, SCALED)
    end = n_rows
    if end_ptr is not None:
        end = tl.load(end_ptr).to(tl.int32)
    blocks = tl.cdiv(n_rows, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(share, n_sequences * blocks, shares):
        rows = block % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        base = ((block // blocks).to(tl.int64) * heads + head) * n_rows
        terms = load_row_terms(statistics_ptr + base, plane, delta_ptr + base, rows, end, True)
        total += taken_by_sink(sink, terms, SCALED)
    tl.store(partials_ptr + share * heads + head, -tl.sum(total, 0))


def attention_sink_gradient(
    statistics: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype, terms: AttentionTerms
) -> torch.Tensor | None:
    """Compute the gradient of ``terms.sinks`` [H].

    From ``statistics`` [2, B, H, L] and ``delta`` [B, H, L] of queries of ``dtype``; None without
    sinks.
    """
    sinks = contiguous_vector(terms.sinks)
    if sinks is None:
        return None
    batch, heads, n_rows = delta.shape
    if delta.numel() == 0:
        unplanned()
        return torch.zeros_like(sinks)
    target = targets.target_of(delta.device)
    shares = min(
        batch * targets.ceil_div(n_rows, BLOCK), targets.ceil_div(2 * target.multiprocessors, heads)
    )
    partials = delta.new_empty(shares, heads)
    launch(
        _attention_sink_gradient, (shares * heads,), targets.LaunchConfig(4, 2), sinks, statistics,
        delta, None if terms.starts_q is None else terms.starts_q[-1:], partials, heads, n_rows,
        batch, delta.numel(), shares, BLOCK=BLOCK, SCALED=scores_are_scaled(dtype, terms),
    )
    return sum_partials(partials, sinks.dtype)
