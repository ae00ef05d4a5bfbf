"""Compute the backward of disentangled attention.

    s = scale * (q k^T + c[i, b(i - j)] + p[j, b(i - j)]);  dc[i, b] = scale * sum of ds where
    b(i - j) = b;  dp[j, b] likewise

c and p are the products of queries, and keys, with one vector for each of W buckets of distances.
Queries, keys and values get their gradients from the kernels of other attention, which add c and p
to each tile of scores. Here a program owns the gradients of BLOCK queries (or keys) for BLOCK_B
buckets. The distances of these are neighbours: it walks the keys (queries) at them, computes the
tile of ds again and gathers from it, one distance of each bucket at a time. No atomics, and no
matrix of queries by keys. It writes each element of dc (dp) once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import (
    Sizes,
    attention_arguments,
    layout_of,
    precision_of,
)
from fusedformer_kernels.attention.backward import score_gradients_of
from fusedformer_kernels.attention.delta import attention_delta
from fusedformer_kernels.attention.schedule import blocks_of
from fusedformer_kernels.attention.scores import Given, load_row_terms, score_gradients
from fusedformer_kernels.attention.terms import OF_HEADS_ALONE, AttentionTerms, PositionTerms
from fusedformer_kernels.attention.tiles import (
    key_rows,
    keys_of,
    load_pair,
    place_of,
    query_rows,
    row_pointer,
    which_block,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import COUNTS, store
from fusedformer_kernels.runtime.steps import unplanned
from fusedformer_kernels.runtime.strided import contiguous


@triton.jit
def _by_bucket(sums, tile, own, begin, end, times, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Add to ``sums`` [BLOCK, BLOCK_B] the elements of a tile [BLOCK, BLOCK] of each bucket.

    Those of row i lie in the columns ``own[i] + SIGN * distance``, of the distances from ``begin``
    to ``end`` [BLOCK_B], at most ``times``.
    """
    for turn in range(0, times):
        distance = begin + turn
        column = own[:, None] + (distance * SIGN)[None, :]
        inside = (distance < end)[None, :] & (column >= 0) & (column < BLOCK)
        found = tl.gather(tile, tl.where(inside, column, 0), 1)
        sums += tl.where(inside, found, 0.0)
    return sums


@triton.jit(do_not_specialize=COUNTS)
def _attention_bucket_gradients(
    q_ptr, k_ptr, v_ptr, grad_ptr, statistics_ptr, delta_ptr, given, firsts_ptr, sums_ptr, work_ptr,
    s, heads, queries, keys, in_sixteens, radius, q_layout, k_layout, v_layout, grad_layout,
    sums_batch, sums_head, lse_rows, plane, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, OF_KEYS: tl.constexpr,
):
    """Write the sums [BLOCK, BLOCK_B] of queries, or with OF_KEYS of keys.

    ``firsts`` [n_buckets + 1] has the first distance of each bucket, and where the last ends.
    """
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    length = tl.cast(sizes.queries, tl.int32)
    if OF_KEYS:
        length = tl.cast(keys_of(sizes), tl.int32)
    sequence, head, block = which_block(work_ptr, sizes.heads, tl.cdiv(length, BLOCK), False)
    if work_ptr is not None:  # noqa: SIM102 (decided by the compiler, unlike the inner one)
        if sequence < 0:
            return
    place = place_of(s, sizes, sequence, head)
    first_own = block * BLOCK
    own = first_own + tl.arange(0, BLOCK)  # [BLOCK]
    q_base = query_rows(q_ptr, q_layout, place)
    grad_base = query_rows(grad_ptr, grad_layout, place)
    k_base = key_rows(k_ptr, k_layout, place)
    v_base = key_rows(v_ptr, v_layout, place)  # Triton 3.6 unpacks no tuple with None
    row_base = row_pointer(statistics_ptr, sizes, place, lse_rows)
    delta_base = row_pointer(delta_ptr, sizes, place, lse_rows)

    first_bucket = tl.program_id(1) * BLOCK_B
    bucket = first_bucket + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    last_bucket = s.n_buckets - 1
    end_bucket = tl.minimum(first_bucket + BLOCK_B, s.n_buckets)
    begin = tl.load(firsts_ptr + bucket, mask=bucket < end_bucket, other=0)
    end = tl.load(firsts_ptr + bucket + 1, mask=bucket < end_bucket, other=0)
    lowest = tl.load(firsts_ptr + first_bucket)
    highest = tl.load(firsts_ptr + end_bucket)
    # The first and the last bucket have all distances beyond: sums of rows, added at the end.
    below = tl.load(firsts_ptr + 1)
    above = tl.load(firsts_ptr + last_bucket)
    end = tl.where((bucket > 0) & (bucket < last_bucket), end, begin)
    longest = tl.max(end - begin, 0)
    if OF_KEYS:  # which queries i = j + distance see
        first = first_own + lowest
        last = tl.minimum(first_own + BLOCK - 1 + highest, place.n_queries)
        own_tile, own_other = load_pair(
            k_base, v_base, first_own, place.n_keys, k_layout, v_layout, BLOCK, HEAD_DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, False,
        )  # [BLOCK, BLOCK_D], [BLOCK, BLOCK_DV]
    else:  # which see keys j = i - distance
        first = first_own + 1 - highest
        last = tl.minimum(first_own + BLOCK - lowest, place.n_keys)
        own_tile, own_other = load_pair(
            q_base, grad_base, first_own, place.n_queries, q_layout, grad_layout, BLOCK, HEAD_DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, False,
        )  # [BLOCK, BLOCK_D], [BLOCK, BLOCK_DV]
    sums = tl.zeros([BLOCK, BLOCK_B], tl.float32)
    far_below = tl.zeros([BLOCK], tl.float32)
    far_above = tl.zeros([BLOCK], tl.float32)
    for index in tl.range(tl.maximum(first, 0) // BLOCK, tl.cdiv(last, BLOCK), num_stages=1):
        start = index * BLOCK
        walked = start + tl.arange(0, BLOCK)  # [BLOCK]
        if OF_KEYS:
            q, grad = load_pair(
                q_base, grad_base, start, place.n_queries, q_layout, grad_layout, BLOCK, HEAD_DIM,
                VALUE_DIM, BLOCK_D, BLOCK_DV, False,
            )
            terms = load_row_terms(row_base, plane, delta_base, walked, place.n_queries, SCALED)
            _, tile, _ = score_gradients(
                q, grad, own_tile, own_other, terms, start, first_own, True, given, s, sizes,
                place, BLOCK, True, SCALED, PRECISION,
            )
            tile = tl.trans(tile)  # [own, walked]
            distance = walked[None, :] - own[:, None]
        else:
            k, v = load_pair(
                k_base, v_base, start, place.n_keys, k_layout, v_layout, BLOCK, HEAD_DIM,
                VALUE_DIM, BLOCK_D, BLOCK_DV, False,
            )
            terms = load_row_terms(row_base, plane, delta_base, own, place.n_queries, SCALED)
            _, tile, _ = score_gradients(
                own_tile, own_other, k, v, terms, first_own, start, True, given, s, sizes, place,
                BLOCK, True, SCALED, PRECISION,
            )
            distance = own[:, None] - walked[None, :]
        if first_bucket == 0:
            far_below += tl.sum(tl.where(distance < below, tile, 0.0), 1)
        if end_bucket > last_bucket:
            far_above += tl.sum(tl.where(distance >= above, tile, 0.0), 1)
        nearest = start - first_own if OF_KEYS else first_own - start
        near = (nearest - BLOCK < above) & (nearest + BLOCK > below)
        sums = _by_bucket(
            sums, tile, own - start, begin, end, tl.where(near, longest, 0), 1 if OF_KEYS else -1,
            BLOCK,
        )
    sums += tl.where((bucket == 0)[None, :], far_below[:, None], 0.0)
    sums += tl.where((bucket == last_bucket)[None, :], far_above[:, None], 0.0)
    n_own, row = place.n_queries, place.q_start
    if OF_KEYS:
        n_own, row = place.stored_keys, place.k_start
    base = sums_ptr + place.batch * sums_batch + place.head * sums_head + row * s.n_buckets
    pointers = (base + own.to(tl.int64) * s.n_buckets)[:, None] + bucket[None, :]
    store(pointers, sums * s.scale, (own < n_own)[:, None] & (bucket < end_bucket)[None, :])


@planned
def disentangled_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    statistics: torch.Tensor,
    terms: AttentionTerms,
    positions: PositionTerms,
    firsts: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Compute gradients of (query, key, value), and of the position terms, None for None.

    ``firsts`` is int32 ``[W + 1]``: the first distance of each bucket, and one beyond all.
    """
    statistics = contiguous(statistics)
    precision = precision_of(query, value.shape[3])
    delta = attention_delta(grad, output, None, statistics, precision)
    needs = OF_HEADS_ALONE[:-1]
    first = score_gradients_of(
        query, key, value, grad, statistics, delta, None, Given(), terms, needs, (), positions
    )[:3]
    of_rows = positions.of_queries, positions.of_keys
    found = [None if x is None else torch.empty_like(x) for x in of_rows]
    arguments = attention_arguments(query, key, value.shape[3], terms, positions)
    if statistics.numel() == 0 or key.shape[2] == 0 or arguments.sequences == 0:
        unplanned()
        return *first, *(None if x is None else x.zero_() for x in found)
    config = configs.attention_bucket_gradient_config(
        arguments.kind, targets.target_of(query.device)
    )
    tensors = (query, key, value, grad, statistics, delta, Given(), firsts)
    layouts = tuple(layout_of(t) for t in (query, key, value, grad))
    for sums, rows in zip(found, (query, key), strict=True):
        if sums is None:
            continue
        of_keys = rows is key
        work, blocks = blocks_of(arguments, terms, rows.shape[2], config.block_m, of_keys=of_keys)
        launch(
            _attention_bucket_gradients,
            (blocks * rows.shape[1], targets.ceil_div(sums.shape[3], config.block_n)), config,
            *tensors, sums, work, arguments.scores, *arguments.sizes, *layouts,
            sums.stride(0) if sums.shape[0] > 1 else 0, sums.stride(1), query.shape[2],
            statistics[0].numel(),
            BLOCK=config.block_m, BLOCK_B=config.block_n, OF_KEYS=of_keys, **arguments.constants,
        )
    return *first, *found
