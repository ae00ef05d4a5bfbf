"""Compute a tile of scores, its weights and its gradients: functions of attention's kernels.

The softmax of a row is kept as two numbers, so that the backward and the weights find exactly the
weights of the forward again: ``minus_top``, the largest score negated, and ``inverse``, one by the
sum of ``exp(score + minus_top)``. One log-sum-exp would round its sum away where scores are large:
at -1e9 all of it.
Scores are raw products of half precision where nothing is added to them (SCALED is False); then the
scale enters in the exponent, by one fused multiply-add, and the top is in base 2. Else they are the
scores of the definition, and the top is one of them: nothing that could overflow is multiplied, and
the largest exponent is exactly 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedformer_kernels.runtime.primitives import (
    LN_2,
    LOG2_E,
    dot,
    dropout_keep_tile,
    dropout_scale,
    fma,
    negative,
    tanh,
)


class Given(NamedTuple):
    """Gradient of the attention weights as a tensor, in place of do v^T where there is one."""

    pointer: Any = None
    batch: Any = 0  # strides
    head: Any = 0
    row: Any = 0
    column: Any = 0
    factor: Any = 0.0


@triton.jit
def _with_bias(scores, factor, bias):
    """Compute ``scores * factor + bias``; a factor of None is 1."""
    if factor is None:
        scores += bias
    else:
        scores = fma(scores, factor, bias)
    return scores


@triton.jit
def with_positions(product, rows, columns, s, sizes, place):
    """Add what queries and keys have for the bucket of their distance, row less column."""
    distances = tl.minimum(tl.maximum(rows - columns, -sizes.radius), sizes.radius)
    bucket = tl.load(s.buckets + sizes.radius + distances)
    valid = (rows < place.n_queries) & (columns < place.n_keys)
    if s.of_queries is not None:
        pointers = place.of_queries + (rows * s.n_buckets + bucket)
        product += tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
    if s.of_keys is not None:
        pointers = place.of_keys + (columns * s.n_buckets + bucket)
        product += tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
    return product


@triton.jit
def table_bias(
    first_row, first_column, s, place, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Load the table's entries for a tile [ROWS, COLUMNS] or its transpose; None without a table.

    As for tiles of keys, 64-bit arithmetic is a scalar and offsets that no loop changes. Sequences
    longer than a packed call said they are at most read entries of other distances, none outside.
    """
    bias = None
    if s.table is not None:
        distance = first_column - first_row - place.offset
        distance = tl.maximum(distance, -s.table_middle + ROWS)
        distance = tl.minimum(distance, s.table_middle - COLUMNS)
        rows = tl.arange(0, ROWS).to(tl.int64)
        columns = tl.arange(0, COLUMNS).to(tl.int64)
        if TRANSPOSED:
            offsets = columns[:, None] - rows[None, :]
        else:
            offsets = columns[None, :] - rows[:, None]
        bias = tl.load(place.table + distance + offsets)
    return bias


@triton.jit
def gates(rows, s, place):
    """Load the factors on the biases of ``rows``, in whose shape; 0 beyond the last query."""
    pointers = place.gate + rows.to(tl.int64) * s.gate_row
    return tl.load(pointers, mask=rows < place.n_queries, other=0.0).to(tl.float32)


@triton.jit
def _mask_elements(rows, columns, s, place):
    """Point to elements of the mask."""
    pointers = place.mask + rows.to(tl.int64) * s.mask_row
    return pointers + columns.to(tl.int64) * s.mask_column


@triton.jit
def _where_zero(hidden, scores):
    """Give ``scores`` where ``hidden`` is 0, and -inf where it is -1.

    By bits: predicates of a tile are too many, and ptxas would pack them in words for the time of a
    product.
    """
    bits = scores.to(tl.int32, bitcast=True)
    bits = (bits & ~hidden) | (hidden & -0x800000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def mask_bias(rows, columns, valid, s, place):
    """Load a tile of an additive mask, 0 where not ``valid``."""
    pointers = _mask_elements(rows, columns, s, place)
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def score_tile(
    product, rows, columns, partial, s, sizes, place, table_tile, CHECKED: tl.constexpr,
    SCALED: tl.constexpr, mask_tile=None,
):
    """Compute scores, -inf where hidden, and raw products unless SCALED; and the tanh.

    ``rows`` and ``columns`` are indices that broadcast to the shape of ``product``, which may be
    [queries, keys] or its transpose. CHECKED tiles are tested against bounds, window and
    causality. ``table_tile`` is from :func:`table_bias`; an additive mask's ``mask_tile`` is loaded
    unless the caller has it. The second result is that of ``tanh`` where scores are capped.
    """
    if s.buckets is not None:
        product = with_positions(product, rows, columns, s, sizes, place)
    scores = product
    capped = product
    factor = None  # that the scores are still to be multiplied by
    if SCALED:
        factor = s.scale
        if s.softcap is not None:
            capped = tanh(product * (s.scale / s.softcap))
            scores = capped
            factor = s.softcap
    distances = columns - rows - place.offset
    if s.slopes is not None:
        bias = tl.abs(distances).to(tl.float32) * negative(place.slope)
        scores = _with_bias(scores, factor, bias)
        factor = None
    if s.table is not None:
        bias = table_tile
        if s.gate is not None:
            bias *= gates(rows, s, place)
        scores = _with_bias(scores, factor, bias)
        factor = None
    if s.mask is not None and s.mask.dtype.element_ty != tl.uint8:
        bias = mask_tile
        if mask_tile is None:
            valid = (rows < place.n_queries) & (columns < place.n_keys) & partial
            bias = mask_bias(rows, columns, valid, s, place)
        scores = _with_bias(scores, factor, bias)
        factor = None
    if factor is not None:
        scores *= factor
    in_mask = False  # whether the mask hides what is beyond the last key too
    if s.mask is not None and s.mask.dtype.element_ty == tl.uint8:
        # A full tile has no key beyond the last.
        in_mask = s.key_lengths is None and s.starts_k is None
        valid = (rows < place.n_queries) & (columns < place.n_keys) & partial
        keep = tl.load(_mask_elements(rows, columns, s, place), mask=valid, other=0).to(tl.int32)
        scores = _where_zero(keep - tl.cast(partial, tl.int32), scores)
    if s.key_mask is not None:
        pointers = place.key_mask + columns.to(tl.int64) * s.key_mask_column
        keep = tl.load(pointers, mask=columns < place.n_keys, other=0)
        scores = tl.where(keep != 0, scores, float("-inf"))
    if CHECKED:
        if not in_mask:
            scores = tl.where(columns < place.n_keys, scores, float("-inf"))
        if s.right is not None:
            scores = tl.where(distances <= s.right, scores, float("-inf"))
        if s.left is not None:
            scores = tl.where(distances >= -s.left, scores, float("-inf"))
    return scores, capped


@triton.jit
def exponentials(scores, minus_top, s, SCALED: tl.constexpr):
    """Compute ``exp(score + minus_top)`` of :func:`score_tile`'s scores; a top broadcasts."""
    if SCALED:
        return tl.exp2((scores + minus_top) * LOG2_E)
    return tl.exp2(fma(scores, s.scale * LOG2_E, minus_top))


@triton.jit
def online_softmax_update(scores, top, total, s, SCALED: tl.constexpr):
    """Do one step of the online softmax over a tile [BLOCK_M, BLOCK_N].

    ``top`` and ``total`` [BLOCK_M] are the largest score so far and the sum of the weights.
    Returns (weights, rescaling of earlier sums, top, total). Source: arXiv:1805.02867.
    """
    tile_top = tl.max(scores, 1)
    if not SCALED:
        tile_top *= s.scale * LOG2_E
    new_top = tl.maximum(top, tile_top)
    # A row with no visible key yet keeps -inf, and is shifted by 0: no NaN.
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = exponentials(scores, negative(finite)[:, None], s, SCALED)
    rescale = power(top - finite, SCALED)
    return weights, rescale, new_top, fma(total, rescale, tl.sum(weights, 1))


@triton.jit
def power(difference, SCALED: tl.constexpr):
    """Compute ``exp`` of the difference of two tops."""
    if SCALED:
        difference *= LOG2_E
    return tl.exp2(difference)


@triton.jit
def sink_of(pointer, SCALED: tl.constexpr):
    """Load the sink of a head, or those of several, in the units of tops."""
    sink = tl.load(pointer).to(tl.float32)
    if not SCALED:
        sink *= LOG2_E
    return sink


@triton.jit
def with_sink(top, total, sink, SCALED: tl.constexpr):
    """Add the sink to rows' sums: (top, total, rescaling of earlier sums).

    It comes last: weights beside a high sink would be too small for half precision.
    """
    new_top = tl.maximum(top, sink)
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    rescale = power(top - finite, SCALED)
    return new_top, fma(total, rescale, power(sink - finite, SCALED)), rescale


@triton.jit
def taken_by_sink(sink, terms, SCALED: tl.constexpr):
    """Multiply the sink's weight by delta, of rows with ``terms`` from load_row_terms.

    The gradients of a row's scores add up to this more than that of its log-sum-exp.
    """
    minus_top, inverse, delta = terms
    return power(sink + minus_top, SCALED) * inverse * delta


@triton.jit
def log_sum_exp(top, total, SCALED: tl.constexpr):
    """Compute the natural log-sum-exp, -inf where ``total`` is 0."""
    logarithm = tl.log2(tl.where(total == 0.0, 1.0, total))
    if SCALED:
        lse = fma(logarithm, LN_2, top)
    else:
        lse = (top + logarithm) * LN_2
    return tl.where(total == 0.0, float("-inf"), lse)


@triton.jit
def store_row_statistics(pointer, plane, rows, row_valid, top, total):
    """Store (minus_top, inverse) of rows, which :func:`load_row_terms` reads."""
    visible = total != 0.0  # true for NaN, which stays one
    # Exponentials are 0 where nothing is visible.
    tl.store(pointer + rows, tl.where(visible, -top, float("-inf")), mask=row_valid)
    tl.store(pointer + plane + rows, 1.0 / tl.where(visible, total, 1.0), mask=row_valid)


@triton.jit
def load_row_terms(statistics_base, plane, delta_base, rows, n_queries, SCALED: tl.constexpr):
    """Load (minus_top, inverse, delta) [BLOCK_M]; weights are 0 beyond the last query.

    Statistics are [2, ...]: ``plane`` elements lie between the first two.
    """
    row_valid = rows < n_queries
    # Raw products of absent queries are 0, and so are their weights by an inverse of 0 alone; a
    # bias may be so large that its exponential times 0 is NaN.
    absent = float("-inf") if SCALED else 0.0
    minus_top = tl.load(statistics_base + rows, mask=row_valid, other=absent)
    inverse = tl.load(statistics_base + plane + rows, mask=row_valid, other=0.0)
    delta = tl.zeros_like(minus_top)
    if delta_base is not None:
        delta = tl.load(delta_base + rows, mask=row_valid, other=0.0)
    return minus_top, inverse, delta


@triton.jit
def given_gradient(given, rows, columns, place):
    """Load a tile of the weights' gradient; ``rows`` and ``columns`` as for score_tile."""
    base = given.pointer + place.batch * given.batch + place.head * given.head
    pointers = base + rows.to(tl.int64) * given.row
    pointers += columns.to(tl.int64) * given.column
    valid = (rows < place.n_queries) & (columns < place.n_keys)
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32) * given.factor


@triton.jit
def score_gradients(
    q, grad, k, v, terms, first_row, first_column, partial, given, s, sizes, place,
    BLOCK_N: tl.constexpr, CHECKED: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    mask_tile=None, table_tile=None,
):
    """Compute the gradients of a tile's capped scores and of q k^T * scale, and its weights.

    Tiles are [BLOCK_M, BLOCK_N]; the weights are not yet multiplied by ``inverse``. ``terms`` are
    those of load_row_terms; for ``mask_tile`` and ``table_tile`` see :func:`score_tile`: the table
    is read where the caller has not done so.
    """
    minus_top, inverse, delta = terms
    rows = first_row + tl.arange(0, q.shape[0])
    columns = first_column + tl.arange(0, BLOCK_N)
    zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    bias = table_tile
    if table_tile is None:
        bias = table_bias(first_row, first_column, s, place, q.shape[0], BLOCK_N, False)
    scores, capped = score_tile(
        dot(q, tl.trans(k), zeros, PRECISION), rows[:, None], columns[None, :], partial, s, sizes,
        place, bias, CHECKED, SCALED, mask_tile,
    )
    weights = exponentials(scores, minus_top[:, None], s, SCALED)
    inverse = inverse[:, None]
    remainder = negative(inverse * delta[:, None])
    if given.pointer is not None:
        dweights = given_gradient(given, rows[:, None], columns[None, :], place)
    else:
        dweights = dot(grad, tl.trans(v), zeros, PRECISION)
    if s.seed is not None:
        keep = dropout_keep_tile(
            place.dropout_key, place.dropout_offset, first_row, first_column, s.p, q.shape[0],
            BLOCK_N,
        )
        dscores = weights * tl.where(
            keep, fma(dweights, inverse * dropout_scale(s.p), remainder), remainder
        )
    elif q.dtype == tl.float32:
        dscores = weights * inverse * (dweights - delta[:, None])
    else:  # the same, by an instruction less
        dscores = weights * fma(dweights, inverse, remainder)
    dproduct = dscores
    if s.softcap is not None:
        dproduct = dscores * fma(negative(capped), capped, 1.0)
    return dscores, dproduct, weights
