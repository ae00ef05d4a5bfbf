"""Find a program's place, load its tiles and store them: device functions of attention's kernels.

Which sequence, head and block a program has, and which tiles it walks; where their rows begin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedformer_kernels.runtime.primitives import dropout_key, store


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
    mask: Any  # pointers to this sequence and head, where a call has these terms
    key_mask: Any
    slope: Any
    table: Any  # at distance 0
    gate: Any  # at the first query
    of_queries: Any  # at the first query
    of_keys: Any


@triton.jit
def which_block(work, heads, blocks, LAST_FIRST: tl.constexpr):
    """Find (sequence, head, block) of this program; sequence -1 where there is nothing to do.

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
def place_of(s, sizes, sequence, head):
    """Find where ``head`` of ``sequence`` lies, and its terms."""
    batch = sequence.to(tl.int64)
    wide = head.to(tl.int64)
    q_start = batch * 0
    k_start = batch * 0
    stored_queries = tl.cast(sizes.queries, tl.int32)
    stored_keys = tl.cast(keys_of(sizes), tl.int32)
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
    gate = batch
    of_queries = batch
    of_keys = batch
    key = sequence
    key_offset = sequence
    if s.mask is not None:
        mask = s.mask + batch * s.mask_batch + wide * s.mask_head
    if s.key_mask is not None:
        key_mask = s.key_mask + batch * s.key_mask_batch
    if s.slopes is not None:
        slope = tl.load(s.slopes + batch * s.slopes_batch + wide * s.slopes_head)
        slope = slope.to(tl.float32)
    if s.table is not None:
        table = s.table + wide * s.table_head + s.table_middle
    if s.gate is not None:
        gate = s.gate + index * s.gate_batch + wide * s.gate_head + q_start * s.gate_row
    if s.of_queries is not None:
        of_queries = s.of_queries + index * s.of_queries_batch + wide * s.of_queries_head
        of_queries += q_start * s.n_buckets
    if s.of_keys is not None:
        of_keys = s.of_keys + index * s.of_keys_batch + wide * s.of_keys_head
        of_keys += k_start * s.n_buckets
    if s.seed is not None:
        key, key_offset = dropout_key(tl.load(s.seed), sequence * sizes.heads + head)
    return Place(
        index, wide, wide // s.group, q_start, k_start, stored_queries, n_keys, stored_keys,
        offset, key, key_offset, mask, key_mask, slope, table, gate, of_queries, of_keys,
    )


@triton.jit
def keys_of(sizes):
    """Count the keys of the padded form."""
    keys = sizes.keys
    if sizes.in_sixteens is not None:
        keys = keys * 16
    return keys


@triton.jit
def row_stride(layout):
    """Compute the int64 elements from a row to the next."""
    stride = tl.cast(layout.row, tl.int64)
    if layout.in_eights is not None:
        stride = stride * 8
    return stride


@triton.jit
def matrix_of(pointer, layout, batch, head, start):
    """Point to the [sequence, dim] matrix of one head, from row ``start`` on."""
    offset = batch * layout.batch + head * layout.head
    if layout.in_eights is not None:
        offset = offset * 8
    return pointer + offset + start * row_stride(layout)


@triton.jit
def query_rows(pointer, layout, place):
    """Point to the first query of ``place`` in a tensor with a row for each; None for None."""
    rows = pointer
    if pointer is not None:
        rows = matrix_of(pointer, layout, place.batch, place.head, place.q_start)
    return rows


@triton.jit
def key_rows(pointer, layout, place):
    """Point to the first key of ``place`` in a tensor with a row for each; None for None."""
    rows = pointer
    if pointer is not None:
        rows = matrix_of(pointer, layout, place.batch, place.key_head, place.k_start)
    return rows


@triton.jit
def row_pointer(pointer, sizes, place, lse_rows):
    """Point to the [queries] of one head in a tensor [batch, heads, lse_rows]; None for None."""
    rows = pointer
    if pointer is not None:
        rows = pointer + (place.batch * sizes.heads + place.head) * lse_rows + place.q_start
    return rows


@triton.jit
def load_tile(
    base, first, n_rows, layout, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    IN_BOUNDS: tl.constexpr,
):
    """Load rows [first, first + BLOCK) of a [sequence, head_dim] matrix: [BLOCK, BLOCK_D].

    Elements outside of it are 0.

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
def load_pair(
    base, other_base, first, n_rows, layout, other_layout, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, IN_BOUNDS: tl.constexpr,
):
    """Load tiles of queries and of the output's gradient, or of keys and of values.

    Where the gradient of the weights is given there is no second tensor: its tile is the first's,
    and never read.
    """
    tile = load_tile(base, first, n_rows, layout, BLOCK, HEAD_DIM, BLOCK_D, IN_BOUNDS)
    other = tile
    if other_base is not None:
        other = load_tile(
            other_base, first, n_rows, other_layout, BLOCK, VALUE_DIM, BLOCK_DV, IN_BOUNDS
        )
    return tile, other


@triton.jit
def store_rows(base, layout, rows, row_valid, tile, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a float32 tile [rows, BLOCK_D] in a [sequence, head_dim] matrix of contiguous rows."""
    dims = tl.arange(0, BLOCK_D)
    pointers = (base + rows * row_stride(layout))[:, None] + dims[None, :]
    store(pointers, tile, row_valid[:, None] & (dims < DIM)[None, :])


@triton.jit
def load_strided_rows(pointer, strides, batch, head, rows, row_valid):
    """Load int64 ``rows`` of a strided tensor [batch, heads, rows], 0 where not valid."""
    offsets = batch * strides[0] + head * strides[1] + rows * strides[2]
    return tl.load(pointer + offsets, mask=row_valid, other=0.0)


@triton.jit
def key_tiles_of_rows(s, place, first_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Find (first, full, last): tiles of keys from first to last are seen by some of the rows.

    Those before ``full`` are seen whole by all of the rows.
    """
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
    """Find (first element, whether the mask must be read) of the tile at ``index`` of a walk.

    ``tiles`` points to a list of those that a boolean mask leaves, or is None: then all count.
    """
    start = index * BLOCK
    partial = index >= 0
    if tiles is not None:
        entry = tl.load(tiles + index)
        start = (entry >> 1) * BLOCK
        partial = (entry & 1) != 0
    return start, partial
