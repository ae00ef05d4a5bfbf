"""Find where the tokens of a padded batch go when it is packed.

    inverse[b, i] = starts[b] + (number of real tokens before i in sequence b),  -1 for padding
    indices[inverse[b, i]] = b * length + i,  -1 for rows behind the last token

A program a sequence counts its tokens; then one adds up the counts before its own, writes where its
sequence begins and the places of its tokens, and a last program writes what is behind them. Reads
the mask twice and writes 8 bytes a position and a row. The mask may say which tokens are real, or
which are padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import COUNTS

_BLOCK = 512


@triton.jit
def _load_keep(base, columns, n_columns, stride_column, IS_PADDING: tl.constexpr):
    """Load which tokens are real, 0 or 1 [BLOCK], 0 behind the last column."""
    valid = columns < n_columns
    found = tl.load(base + columns.to(tl.int64) * stride_column, mask=valid, other=0)
    if IS_PADDING:
        return ((found == 0) & valid).to(tl.int32)
    return (found != 0).to(tl.int32)


@triton.jit(do_not_specialize=COUNTS)
def _count_tokens(
    mask_ptr, counts_ptr, n_columns, stride_row, stride_column, IS_PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    base = mask_ptr + sequence.to(tl.int64) * stride_row
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        count += _load_keep(base, columns, n_columns, stride_column, IS_PADDING)
    tl.store(counts_ptr + sequence, tl.sum(count, 0))


@triton.jit(do_not_specialize=COUNTS)
def _place_tokens(
    mask_ptr, counts_ptr, starts_ptr, queries_ptr, keys_ptr, indices_ptr, inverse_ptr,
    n_sequences, n_columns, n_rows, stride_row, stride_column, IS_PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, sequence, BLOCK):
        index = start + tl.arange(0, BLOCK)
        before += tl.load(counts_ptr + index, mask=index < sequence, other=0)
    begin = tl.sum(before, 0)
    tl.store(starts_ptr + sequence, begin)
    if queries_ptr is not None:
        tl.store(queries_ptr + sequence, begin)
        tl.store(keys_ptr + sequence, begin)
    if sequence < n_sequences:
        base = mask_ptr + sequence.to(tl.int64) * stride_row
        first = sequence.to(tl.int64) * n_columns
        place = begin
        for start in range(0, n_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            valid = columns < n_columns
            keep = _load_keep(base, columns, n_columns, stride_column, IS_PADDING)
            rank = place + tl.cumsum(keep, 0) - 1
            places = tl.where(keep != 0, rank, -1).to(tl.int64)
            tl.store(inverse_ptr + first + columns, places, mask=valid)
            # The host may have been told of fewer tokens than there are.
            tl.store(indices_ptr + rank, first + columns, mask=(keep != 0) & (rank < n_rows))
            place += tl.sum(keep, 0)
    else:
        for start in range(begin, n_rows, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            nowhere = tl.full([BLOCK], -1, tl.int64)
            tl.store(indices_ptr + rows, nowhere, mask=rows < n_rows)
        if queries_ptr is not None:
            tl.store(queries_ptr + sequence + 1, n_rows)
            tl.store(queries_ptr + sequence + 2, n_rows)
            tl.store(keys_ptr + sequence + 1, begin)
            tl.store(keys_ptr + sequence + 2, n_rows)


@planned
def token_counts(mask: torch.Tensor, is_padding: bool) -> torch.Tensor:
    """Count the real tokens of each sequence: int32 ``[batch]`` of boolean ``[batch, length]``."""
    batch, length = mask.shape
    counts = torch.empty(batch, dtype=torch.int32, device=mask.device)
    mask = mask.view(torch.uint8)
    launch(
        _count_tokens, (batch,), targets.LaunchConfig(4, 2), mask, counts, length, *mask.stride(),
        IS_PADDING=is_padding, BLOCK=_BLOCK,
    )
    return counts


@planned
def token_places(
    mask: torch.Tensor, counts: torch.Tensor, rows: int, tail: bool, is_padding: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Find (starts, starts of queries, starts of keys, indices ``[rows]``, inverse) of a mask.

    It is boolean ``[batch, length]`` with elements; ``counts`` are its own. With a ``tail``,
    queries and keys have two sequences more: the rows behind the last token, once as queries and
    once as keys.
    """
    batch, length = mask.shape

    def new(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=mask.device)

    starts = new(batch + 1, torch.int32)
    queries = new(batch + 3, torch.int32) if tail else None
    keys = new(batch + 3, torch.int32) if tail else None
    indices, inverse = new(rows, torch.int64), new(batch * length, torch.int64)
    mask = mask.view(torch.uint8)
    launch(
        _place_tokens, (batch + 1,), targets.LaunchConfig(4, 2), mask, counts, starts, queries,
        keys, indices, inverse, batch, length, rows, *mask.stride(),
        IS_PADDING=is_padding, BLOCK=_BLOCK,
    )
    return starts, queries, keys, indices, inverse
