"""List the tiles of a boolean attention mask that have anything in them.

One program owns a block of rows (or, for the keys' side of the backward, of columns) of one plane
of the mask, walks the tiles of its block, several at a time, and lists those that are not empty, in
order; it marks those that are full, so that the attention kernels skip the empty ones and do not
read the mask of the full ones. Reads the mask once, a byte an element; writes 4 bytes a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention.arguments import AttentionArguments, broadcast_strides
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS

_ELEMENTS = 16384  # that a program of 8 warps reads at a time


class MaskTiles(NamedTuple):
    """Lists of tiles as kernels get them: entries are 2 * tile + (1 if the mask must be read).

    Without entries there is no boolean mask. (Triton 3.6 cannot compare a whole tuple with None.)
    """

    entries: Any = None  # int32 [planes..., blocks, tiles]
    counts: Any = None  # int32 [planes..., blocks]
    batch: Any = 0  # strides of counts, 0 where the mask broadcasts
    head: Any = 0
    block: Any = 0
    length: Any = 0  # of a list


@triton.jit
def tiles_of(tiles, sequence, head, block):
    """Find (pointer to the list, number of tiles) for one block of one head."""
    index = sequence.to(tl.int64) * tiles.batch + head * tiles.head
    index += block * tiles.block
    return tiles.entries + index * tiles.length, tl.load(tiles.counts + index)


@triton.jit(do_not_specialize=COUNTS)
def _list_mask_tiles(
    mask_ptr, entries_ptr, counts_ptr, heads, n_blocks, n_tiles, n_rows, n_columns, left, right,
    mask_strides, BLOCK: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    OF_COLUMNS: tl.constexpr,
):
    """List the tiles of a block, TILES at a time."""
    pid = tl.program_id(0)
    block = pid % n_blocks
    plane = (pid // n_blocks).to(tl.int64)
    base = mask_ptr + plane // heads * mask_strides[0] + plane % heads * mask_strides[1]
    own = block * BLOCK + tl.arange(0, BLOCK)
    count = 0
    for tile in range(0, n_tiles, TILES):
        other = tile * TILE + tl.arange(0, TILES * TILE)
        if OF_COLUMNS:
            rows = other[:, None]  # [TILES * TILE, 1]
            columns = own[None, :]  # [1, BLOCK]
        else:
            rows = own[:, None]  # [BLOCK, 1]
            columns = other[None, :]  # [1, TILES * TILE]
        inside = (rows < n_rows) & (columns < n_columns)
        pointers = base + rows.to(tl.int64) * mask_strides[2]
        pointers += columns.to(tl.int64) * mask_strides[3]
        keep = tl.load(pointers, mask=inside, other=0) != 0
        if right is not None:
            keep = keep & (columns - rows <= right)
        if left is not None:
            keep = keep & (columns - rows >= -left)
        # Counts of both kinds in one number: a tile has less than 2^16 elements. Columns beyond the
        # last are hidden, so that those who read the mask need not test for them.
        kinds = tl.where(keep, 1, tl.where(inside | (columns >= n_columns), 1 << 16, 0))
        if OF_COLUMNS:
            kinds = tl.sum(tl.sum(tl.reshape(kinds, [TILES, TILE, BLOCK]), 2), 1)  # [TILES]
        else:
            kinds = tl.sum(tl.sum(tl.reshape(kinds, [BLOCK, TILES, TILE]), 2), 0)
        some = ((kinds & 0xFFFF) != 0).to(tl.int32)
        entry = 2 * (tile + tl.arange(0, TILES)) + (kinds > 0xFFFF).to(tl.int32)
        place = count + tl.cumsum(some, 0) - some
        tl.store(entries_ptr + pid.to(tl.int64) * n_tiles + place, entry, mask=some != 0)
        count += tl.sum(some, 0)
    tl.store(counts_ptr + pid, count)


def mask_tiles(
    arguments: AttentionArguments, block: int, tile: int, *, of_columns: bool = False
) -> MaskTiles:
    """List tiles of ``tile`` columns for blocks of ``block`` rows, or the other way round.

    A mask that broadcasts over sequences, heads or rows is listed once.
    """
    if not arguments.lists_tiles:
        return MaskTiles()
    scores = arguments.scores
    mask = scores.mask
    n_rows, n_columns = arguments.max_queries, arguments.max_keys
    blocked, walked = (n_columns, n_rows) if of_columns else (n_rows, n_columns)
    windowed = scores.left is not None or scores.right is not None
    one_row = mask.shape[2] == 1 and not of_columns and not windowed
    n_blocks = 1 if one_row else targets.ceil_div(blocked, block)
    n_tiles = targets.ceil_div(walked, tile)
    sizes = (*mask.shape[:2], n_blocks)
    counts = torch.empty(sizes, dtype=torch.int32, device=mask.device)
    entries = torch.empty((*counts.shape, n_tiles), dtype=torch.int32, device=mask.device)
    left, right = _window_from_diagonal(arguments)
    launch(
        _list_mask_tiles, (counts.numel(),), targets.LaunchConfig(8, 2), mask, entries, counts,
        mask.shape[1], n_blocks, n_tiles, 1 if one_row else n_rows, n_columns,
        left, right, broadcast_strides(mask, 4), BLOCK=block, TILE=tile,
        TILES=max(1, _ELEMENTS // (block * tile)), OF_COLUMNS=of_columns,
    )
    batch, head, row = broadcast_strides(counts, 3)
    return MaskTiles(entries, counts, batch, head, row, n_tiles)


def _window_from_diagonal(arguments: AttentionArguments) -> tuple[int | None, int | None]:
    """Find (left, right) of all sequences from row = column; None if unbounded or not known."""
    scores, offset = arguments.scores, 0
    if scores.align_end is not None:
        if scores.starts_q is not None or scores.key_lengths is not None:
            return None, None
        offset = arguments.max_keys - arguments.max_queries
    left = None if scores.left is None else scores.left - offset
    return left, None if scores.right is None else scores.right + offset
