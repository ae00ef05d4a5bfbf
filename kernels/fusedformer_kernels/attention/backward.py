"""Compute attention's backward: gradients of query, key, value and of the terms.

    p = exp(s - top) / sum;  dv = dropout(p)^T do;  dp = dropout'(do v^T)
    delta = rowsum(do * o) - dlse;  ds = p * (dp - delta);  dq = scale * ds k;  dk = scale * ds^T q

The same inputs give the same bits. The gradients of the terms, and delta, have files of their own.
In one kernel (backward_keys.py) a program owns a block of keys, of all query heads that share it,
and walks the queries: dk, dv. In one (backward_queries.py) it owns a block of queries and walks the
keys: dq. Scores are recomputed from q and k, seven products in all. In one pass, where a tuned
table says so, the first kernel adds up dq too, five products (query_sums.py). Few queries have a
kernel of their own (few_queries.py).
For the gradient of the attention weights themselves (weights.py), dp is a given tensor and delta 0.
Source: Dao, FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

from typing import Any

import torch

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import (
    AttentionArguments,
    Layout,
    attention_arguments,
    layout_of,
    precision_of,
)
from fusedformer_kernels.attention.backward_keys import fill_key_gradients
from fusedformer_kernels.attention.backward_queries import fill_query_gradients
from fusedformer_kernels.attention.delta import attention_delta
from fusedformer_kernels.attention.few_queries import few_queries_backward
from fusedformer_kernels.attention.gate_gradient import attention_gate_gradient
from fusedformer_kernels.attention.mask_gradient import attention_mask_gradient
from fusedformer_kernels.attention.query_sums import QuerySums, cleared_query_sums, store_query_sums
from fusedformer_kernels.attention.schedule import blocks_of
from fusedformer_kernels.attention.scores import Given
from fusedformer_kernels.attention.sink_gradient import attention_sink_gradient
from fusedformer_kernels.attention.slope_gradient import attention_slope_gradient
from fusedformer_kernels.attention.table_gradient import attention_table_gradient
from fusedformer_kernels.attention.terms import AttentionTerms, PositionTerms
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.steps import unplanned
from fusedformer_kernels.runtime.strided import contiguous


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
    query, _, _, _, _, _, given = tensors
    config = configs.attention_backward_config(arguments.kind, target)
    in_one_pass = _is_one_pass(config, arguments, target, dq, dk, dv, given)
    if dk is not None or dv is not None:
        query_sums, sum_tiles = QuerySums(), 0
        if in_one_pass:
            query_sums, sum_tiles = cleared_query_sums(arguments, query, target, config)
        fill_key_gradients(
            tensors, layouts, dk, dv, arguments, terms, config, query_sums, sum_tiles
        )
    if in_one_pass and dq is not None:
        work, blocks = blocks_of(arguments, terms, query.shape[2], config.block_m, of_keys=False)
        store_query_sums(
            query_sums, sum_tiles, dq, layout_of(dq), work, blocks, arguments, config.block_m
        )
    elif dq is not None:
        fill_query_gradients(tensors, layouts, dq, dlse, arguments, terms, config)


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
