"""Move rows between the padded and the packed form.

    y[i] = x[index[i]],  0 where index[i] < 0

Packing and unpacking are the same kernel with inverse indices, and each the other's gradient. One
program moves BLOCK_M rows by BLOCK_N columns; each row is read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def _gather_rows(
    x_ptr, index_ptr, y_ptr, n_rows, n_columns, stride_row, stride_column, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(n_columns, BLOCK_N)
    rows = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_valid = rows < n_rows
    source = tl.load(index_ptr + rows, mask=row_valid, other=-1).to(tl.int64)
    valid = row_valid[:, None] & (columns < n_columns)[None, :]
    offsets = (source * stride_row)[:, None] + (columns * tl.cast(stride_column, tl.int64))[None, :]
    x = tl.load(x_ptr + offsets, mask=valid & (source >= 0)[:, None], other=0.0)
    y_offsets = (rows.to(tl.int64) * n_columns)[:, None] + columns[None, :]
    tl.store(y_ptr + y_offsets, x, mask=valid)


@planned
def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather rows of ``x`` [N, D] by ``index`` [M]: contiguous [M, D], 0 where the index is < 0."""
    n_rows, n_columns = index.shape[0], x.shape[1]
    y = torch.empty((n_rows, n_columns), dtype=x.dtype, device=x.device)
    if y.numel():
        config = configs.elementwise_tile("gather_rows", n_columns, targets.target_of(x.device))
        blocks = targets.ceil_div(n_rows, config.block_m)
        blocks *= targets.ceil_div(n_columns, config.block_n)
        launch(
            _gather_rows, (blocks,), config, x, index, y, n_rows, n_columns, *x.stride(),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        )
    return y
