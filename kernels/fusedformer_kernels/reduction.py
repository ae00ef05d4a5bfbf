"""Second stage of reductions over rows: partial sums are added in a fixed order, without atomics.

One program adds up BLOCK_N columns of all partial rows; the number of rows is bounded by
``configs.row_programs``, so this stage reads little.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels import configs
from fusedformer_kernels.launch import launch
from fusedformer_kernels.primitives import store


@triton.jit
def _sum_partials(
    partials_ptr, sums_ptr, n_rows, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n_rows, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # [BLOCK_M]
        valid = (rows < n_rows)[:, None] & in_row[None, :]
        offsets = (rows * n_columns)[:, None] + columns[None, :]
        total += tl.load(partials_ptr + offsets, mask=valid, other=0.0)
    store(sums_ptr + columns, tl.sum(total, 0), in_row)


def sum_partials(partials: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Column sums of float32 ``[rows, columns]``, contiguous, as ``[columns]`` of ``dtype``."""
    n_rows, n_columns = partials.shape
    sums = torch.empty(n_columns, dtype=dtype, device=partials.device)
    if n_columns:
        launch(
            _sum_partials, (configs.ceil_div(n_columns, 128),), configs.LaunchConfig(4, 2),
            partials, sums, n_rows, n_columns, BLOCK_M=16, BLOCK_N=128,
        )
    return sums
