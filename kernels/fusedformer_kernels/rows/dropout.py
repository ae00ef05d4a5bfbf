"""Write out the dropout mask that the other kernels apply on the fly, for tests and parity."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    dropout_keep,
    dropout_keep_tile,
    dropout_key,
)


@triton.jit(do_not_specialize=COUNTS)
def _dropout_mask(
    seed_ptr, keep_ptr, p, n_rows, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OF_ATTENTION: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first_column = tl.program_id(1) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    plane = tl.program_id(2)
    if OF_ATTENTION:
        key, offset = dropout_key(tl.load(seed_ptr), plane)
        keep = dropout_keep_tile(key, offset, first_row, first_column, p, BLOCK_M, BLOCK_N)
    else:
        keep = dropout_keep(tl.load(seed_ptr), plane, rows, first_column, p, BLOCK_N)
    valid = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    offsets = (plane.to(tl.int64) * n_rows + rows)[:, None] * n_columns + columns[None, :]
    tl.store(keep_ptr + offsets, keep.to(tl.int8), mask=valid)


def dropout_mask(
    seed: torch.Tensor, p: float, planes: int, n_rows: int, n_columns: int, of_attention: bool
) -> torch.Tensor:
    """Draw a seed's mask as the ops do: boolean ``[planes, n_rows, n_columns]``, True = keep.

    A plane is one (batch, head) of attention, batch major; the row-wise ops use plane 0. The two
    share no draws: each lets one draw serve the elements that lie in one of its threads.
    """
    if p == 0:  # as the ops, which then draw nothing: the smallest draw is below any threshold
        return torch.ones((planes, n_rows, n_columns), dtype=torch.bool, device=seed.device)
    keep = torch.empty((planes, n_rows, n_columns), dtype=torch.int8, device=seed.device)
    grid = (targets.ceil_div(n_rows, 16), targets.ceil_div(n_columns, 64), planes)
    if keep.numel():
        launch(
            _dropout_mask, grid, targets.LaunchConfig(4, 2), seed, keep, p, n_rows, n_columns,
            BLOCK_M=16, BLOCK_N=64, OF_ATTENTION=of_attention,
        )
    return keep.bool()
