"""The mean of a row, and the second stage of reductions over rows.

In that stage partial sums are added in a fixed order, without atomics. One program adds up BLOCK_N
columns of all partial rows; the number of rows is bounded by ``configs.row_programs``, so this
stage reads little.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.runtime import configs
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS, store


@triton.jit
def row_mean(x, in_row, count):
    """Mean of ``count`` columns of rows [BLOCK_M, BLOCK_N] that are 0 outside ``in_row``.

    Of equal values it is that value to the bit. Their sum is rounded, and the quotient off by
    several ulps; what is missing is small and its mean accurate.
    """
    mean = tl.sum(x, 1) / count
    return mean + tl.sum(tl.where(in_row, x - mean[:, None], 0.0), 1) / count


@triton.jit
def store_partials(
    partials_ptr, columns, n_columns, dweight, dbias, dinput_bias,
    NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr, NEEDS_INPUT_BIAS: tl.constexpr,
):
    """Write one program's column sums of tiles [BLOCK_M, BLOCK_N], a row for each asked for."""
    in_row = columns < n_columns
    if NEEDS_WEIGHT:
        tl.store(partials_ptr + columns, tl.sum(dweight, 0), mask=in_row)
        partials_ptr += n_columns
    if NEEDS_BIAS:
        tl.store(partials_ptr + columns, tl.sum(dbias, 0), mask=in_row)
        partials_ptr += n_columns
    if NEEDS_INPUT_BIAS:
        tl.store(partials_ptr + columns, tl.sum(dinput_bias, 0), mask=in_row)


@triton.jit(do_not_specialize=COUNTS)
def _sum_partials(
    partials_ptr, first_ptr, second_ptr, third_ptr, n_rows, n_columns, n_sums,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(n_columns, BLOCK_N)
    which = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    partials_ptr += which * n_columns
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n_rows, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # [BLOCK_M]
        valid = (rows < n_rows)[:, None] & in_row[None, :]
        offsets = (rows * n_columns * n_sums)[:, None] + columns[None, :]
        total += tl.load(partials_ptr + offsets, mask=valid, other=0.0)
    sums = tl.sum(total, 0)  # [BLOCK_N]
    store(first_ptr + columns, sums, in_row & (which == 0))
    if second_ptr is not None:
        store(second_ptr + columns, sums, in_row & (which == 1))
    if third_ptr is not None:
        store(third_ptr + columns, sums, in_row & (which == 2))


def sum_partials(partials: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Column sums of float32 ``[rows, columns]``, contiguous, as ``[columns]`` of ``dtype``."""
    return sums_of_partials(partials, 1, dtype)[0]


def sums_of_partials(
    partials: torch.Tensor, count: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The same of up to three neighbouring parts of the columns: tensors that share no memory."""
    n_rows, n_columns = partials.shape[0], partials.shape[1] // count
    sums = [partials.new_empty(n_columns, dtype=dtype) for _ in range(count)]
    if n_columns:
        launch(
            _sum_partials, (configs.ceil_div(n_columns, 128) * count,), configs.LaunchConfig(4, 2),
            partials, *sums, *[None] * (3 - count), n_rows, n_columns, count, BLOCK_M=16,
            BLOCK_N=128,
        )
    return sums
