"""Compute the mean of a row, and add up the partial sums of reductions over rows.

Partial sums are added in a fixed order, without atomics. One program adds up BLOCK_N columns of all
partial rows, of which ``configs.row_programs`` bounds the number, so that little is read.
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
    """Compute the mean of ``count`` columns of rows [BLOCK_M, BLOCK_N], 0 outside ``in_row``.

    The mean of equal values is that value to the bit. Their sum is rounded, and the quotient off by
    several ulps; the rest is small, and its mean accurate.
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
    """Sum columns of float32 ``[rows, columns]``, contiguous, to ``[columns]`` of ``dtype``."""
    return sums_of_partials(partials, 1, dtype)[0]


def sums_of_partials(
    partials: torch.Tensor, count: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Sum columns in up to three neighbouring parts, to tensors that share no memory."""
    n_rows, n_columns = partials.shape[0], partials.shape[1] // count
    sums = [partials.new_empty(n_columns, dtype=dtype) for _ in range(count)]
    if n_columns:
        launch(
            _sum_partials, (configs.ceil_div(n_columns, 128) * count,), configs.LaunchConfig(4, 2),
            partials, *sums, *[None] * (3 - count), n_rows, n_columns, count, BLOCK_M=16,
            BLOCK_N=128,
        )
    return sums
