"""Device functions that the attention kernels share: where a program works, and one tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedformer_kernels.primitives import (
    LOG2_E,
    dot,
    dropout_keep_tile,
    dropout_key,
    dropout_scale,
    tanh,
)


class Place(NamedTuple):
    """One query head of one sequence, for device code."""

    batch: Any  # int64 index into the tensors: 0 in the packed form
    head: Any  # int64
    key_head: Any  # int64
    q_start: Any  # int64 row at which the sequence begins
    k_start: Any
    n_queries: Any
    n_keys: Any  # that are visible
    stored_keys: Any  # that there are
    offset: Any  # key position of query 0
    dropout_key: Any  # what this head's dropout mask is drawn from
    dropout_offset: Any
    mask: Any  # pointers to this sequence and head, where there are such terms
    key_mask: Any
    slope: Any  # in base 2
    table: Any  # at distance 0


class Given(NamedTuple):
    """Gradient of the attention weights as a tensor, in place of do v^T where there is one."""

    pointer: Any = None
    batch: Any = 0  # strides
    head: Any = 0
    row: Any = 0
    column: Any = 0
    factor: Any = 0.0


@triton.jit
def which_block(work, heads, blocks, LAST_FIRST: tl.constexpr):
    """(sequence, head, block) of this program; sequence -1 where there is nothing to do.

    ``work`` [capacity, 2] lists (sequence, block) of packed sequences, longest first.
    """
    pid = tl.program_id(0)
    if work is not None:
        entry = work + 2 * (pid // heads)
        sequence = tl.load(entry)
        head = pid % heads
        block = tl.load(entry + 1)
    else:
        plane = pid // blocks
        sequence = plane // heads
        head = plane % heads
        block = pid % blocks
        if LAST_FIRST:  # the last queries of a causal sequence see the most keys
            block = blocks - 1 - block
    return sequence, head, block


@triton.jit
def place_of(s, sequence, head):
    """Where ``head`` of ``sequence`` lies, and its terms."""
    batch = sequence.to(tl.int64)
    wide = head.to(tl.int64)
    q_start = batch * 0
    k_start = batch * 0
    stored_queries = tl.cast(s.n_queries, tl.int32)
    stored_keys = tl.cast(s.n_keys, tl.int32)
    index = batch
    if s.starts_q is not None:
        q_start = tl.load(s.starts_q + sequence).to(tl.int64)
        k_start = tl.load(s.starts_k + sequence).to(tl.int64)
        stored_queries = (tl.load(s.starts_q + sequence + 1) - q_start).to(tl.int32)
        stored_keys = (tl.load(s.starts_k + sequence + 1) - k_start).to(tl.int32)
        index = batch * 0
    n_keys = stored_keys
    if s.key_lengths is not None:
        n_keys = tl.minimum(stored_keys, tl.load(s.key_lengths + sequence).to(tl.int32))
    offset = stored_keys * 0
    if s.align_end is not None:
        offset = n_keys - stored_queries
    # Stand-ins for what is absent: never read.
    mask = batch
    key_mask = batch
    slope = batch
    table = batch
    key = sequence
    key_offset = sequence
    if s.mask is not None:
        mask = s.mask + batch * s.mask_batch + wide * s.mask_head
    if s.key_mask is not None:
        key_mask = s.key_mask + batch * s.key_mask_batch
    if s.slopes is not None:
        slope = tl.load(s.slopes + batch * s.slopes_batch + wide * s.slopes_head)
        slope = slope.to(tl.float32) * LOG2_E
    if s.table is not None:
        table = s.table + wide * s.table_head + s.radius * s.table_column
    if s.seed is not None:
        key, key_offset = dropout_key(tl.load(s.seed), sequence * s.heads + head)
    return Place(
        index, wide, wide // s.group, q_start, k_start, stored_queries, n_keys, stored_keys,
        offset, key, key_offset, mask, key_mask, slope, table,
    )


@triton.jit
def row_stride(layout):
    """int64 elements from a row to the next."""
    stride = tl.cast(layout.row, tl.int64)
    if layout.in_eights is not None:
        stride = stride * 8
    return stride


@triton.jit
def matrix_of(pointer, layout, batch, head, start):
    """Pointer to the [sequence, dim] matrix of one head, from row ``start`` on."""
    offset = batch * layout.batch + head * layout.head
    if layout.in_eights is not None:
        offset = offset * 8
    return pointer + offset + start * row_stride(layout)


@triton.jit
def load_tile(
    base, first, n_rows, layout, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    IN_BOUNDS: tl.constexpr,
):
    """Rows [first, first + BLOCK) of a [sequence, head_dim] matrix, 0 outside: [BLOCK, BLOCK_D].

    The 64-bit arithmetic is a scalar and loop-invariant offsets: with it on every element of every
    tile, ptxas serializes the tensor cores.
    """
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    wide_stride = row_stride(layout)
    offsets = (rows * wide_stride)[:, None] + (dims * tl.cast(layout.dim, tl.int64))[None, :]
    pointers = base + first * wide_stride + offsets
    if IN_BOUNDS and DIM == BLOCK_D:
        return tl.load(pointers)
    valid = (dims < DIM)[None, :]
    if not IN_BOUNDS:
        valid = valid & (rows < n_rows - first)[:, None]
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def key_tiles_of_rows(s, place, first_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, full, last): tiles of keys that any of the rows sees; before `full` all see all."""
    first = place.n_keys * 0
    full = place.n_keys
    last = place.n_keys
    if s.right is not None:
        reach = first_row + place.offset + s.right + 1
        last = tl.minimum(last, tl.maximum(reach + BLOCK_M - 1, 0))
        full = tl.minimum(full, tl.maximum(reach, 0))
    if s.left is not None:
        first = tl.maximum(first_row + place.offset - s.left, 0)
    return first // BLOCK_N, full // BLOCK_N, tl.cdiv(last, BLOCK_N)


@triton.jit
def tile_of(tiles, index, BLOCK: tl.constexpr):
    """(first element, whether the mask must be read) of the tile at ``index`` of a walk.

    ``tiles`` points to a list of those that a boolean mask leaves, or is None: then all count.
    """
    start = index * BLOCK
    partial = index >= 0
    if tiles is not None:
        entry = tl.load(tiles + index)
        start = (entry >> 1) * BLOCK
        partial = (entry & 1) != 0
    return start, partial


@triton.jit
def score_tile(
    product, rows, columns, partial, s, place, CHECKED: tl.constexpr, SCALED: tl.constexpr
):
    """Scores with hidden elements at -inf, in base 2 if SCALED, else as they came; and the tanh.

    ``rows`` and ``columns`` are indices that broadcast to the shape of ``product``, which may be
    [queries, keys] or its transpose. CHECKED tiles are tested against bounds, window and
    causality. The second result is that of ``tanh`` where scores are capped.
    """
    scores = product
    capped = product
    if s.softcap is not None:
        capped = tanh(product * (s.scale / s.softcap))
        scores = capped * (s.softcap * LOG2_E)
    elif SCALED:
        scores = product * (s.scale * LOG2_E)
    distances = columns - rows - place.offset
    if s.slopes is not None:
        scores -= tl.abs(distances).to(tl.float32) * place.slope
    if s.table is not None:
        nearest = tl.minimum(tl.maximum(distances, -s.radius), s.radius)
        scores += tl.load(place.table + nearest * s.table_column).to(tl.float32) * LOG2_E
    if s.mask is not None:
        valid = (rows < place.n_queries) & (columns < place.n_keys)
        valid = valid & partial
        pointers = place.mask + rows.to(tl.int64) * s.mask_row
        pointers += columns.to(tl.int64) * s.mask_column
        if s.mask.dtype.element_ty == tl.uint8:
            scores = tl.where(tl.load(pointers, mask=valid, other=1) != 0, scores, float("-inf"))
        else:
            scores += tl.load(pointers, mask=valid, other=0.0).to(tl.float32) * LOG2_E
    if s.key_mask is not None:
        pointers = place.key_mask + columns.to(tl.int64) * s.key_mask_column
        keep = tl.load(pointers, mask=columns < place.n_keys, other=0)
        scores = tl.where(keep != 0, scores, float("-inf"))
    if CHECKED:
        scores = tl.where(columns < place.n_keys, scores, float("-inf"))
        if s.right is not None:
            scores = tl.where(distances <= s.right, scores, float("-inf"))
        if s.left is not None:
            scores = tl.where(distances >= -s.left, scores, float("-inf"))
    return scores, capped


@triton.jit
def online_softmax_update(scores, top, total, exp_scale):
    """One step of the online softmax over a tile [BLOCK_M, BLOCK_N] in base 2.

    ``top`` and ``total`` [BLOCK_M] are the running maximum of raw scores and the running sum of
    ``exp2(exp_scale * (score - top))``. Returns (weights, rescaling of what was summed before,
    top, total). The scale enters in one fused multiply-add an element. Source: arXiv:1805.02867.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row with no visible key yet keeps -inf as its top, and is shifted by 0: no NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) * exp_scale
    weights = tl.exp2(scores * exp_scale - shift[:, None])
    rescale = tl.exp2(top * exp_scale - shift)
    return weights, rescale, new_top, total * rescale + tl.sum(weights, 1)


@triton.jit
def exponent_scale(s, SCALED: tl.constexpr):
    """What :func:`score_tile`'s scores are still to be multiplied by."""
    factor = s.scale * LOG2_E
    if SCALED:
        factor = 1.0
    return factor


@triton.jit
def row_pointer(pointer, s, place, lse_rows):
    """Pointer to the [queries] of one head in a tensor [batch, heads, lse_rows]."""
    return pointer + (place.batch * s.heads + place.head) * lse_rows + place.q_start


@triton.jit
def load_row_terms(lse_base, delta_base, rows, n_queries):
    """(base-2 lse, delta) of queries [BLOCK_M]; +inf where nothing is visible, so weights are 0."""
    row_valid = rows < n_queries
    lse = tl.load(lse_base + rows, mask=row_valid, other=float("-inf"))
    delta = tl.zeros_like(lse)
    if delta_base is not None:
        delta = tl.load(delta_base + rows, mask=row_valid, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), delta


@triton.jit
def given_gradient(given, rows, columns, place):
    """Tile of the gradient of the attention weights; ``rows``, ``columns`` as for score_tile."""
    base = given.pointer + place.batch * given.batch + place.head * given.head
    pointers = base + rows.to(tl.int64) * given.row
    pointers += columns.to(tl.int64) * given.column
    valid = (rows < place.n_queries) & (columns < place.n_keys)
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32) * given.factor


@triton.jit
def score_gradients(
    q, grad, k, v, lse, delta, first_row, first_column, partial, given, s, place, exp_scale,
    BLOCK_N: tl.constexpr, CHECKED: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Of one tile [BLOCK_M, BLOCK_N] the gradients of the capped scores and of q k^T * scale, and
    the weights."""
    rows = first_row + tl.arange(0, q.shape[0])
    columns = first_column + tl.arange(0, BLOCK_N)
    zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    scores, capped = score_tile(
        dot(q, tl.trans(k), zeros, PRECISION), rows[:, None], columns[None, :], partial, s, place,
        CHECKED, SCALED,
    )
    weights = tl.exp2(scores * exp_scale - lse[:, None])
    if given.pointer is not None:
        dweights = given_gradient(given, rows[:, None], columns[None, :], place)
    else:
        dweights = dot(grad, tl.trans(v), zeros, PRECISION)
    if s.seed is not None:
        keep = dropout_keep_tile(
            place.dropout_key, place.dropout_offset, first_row, first_column, s.p, q.shape[0],
            BLOCK_N,
        )
        dweights = tl.where(keep, dweights * dropout_scale(s.p), 0.0)
    dscores = weights * (dweights - delta[:, None])
    dproduct = dscores
    if s.softcap is not None:
        dproduct = dscores * (1.0 - capped * capped)
    return dscores, dproduct, weights
