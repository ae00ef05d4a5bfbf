"""Compute the mean of a row, and add up the partial sums of reductions over rows.

Partial sums are added in a fixed order, without atomics. One program adds up BLOCK_N columns of all
partial rows, of which ``configs.row_programs`` bounds the number, so that little is read. On sm_90
its launch overlaps the end of the one that leaves the partial sums: ``targets.OverlappingConfig``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS, fma, store, wait_for_last


@triton.jit
def row_mean(x, in_row, count):
    """Compute the mean of ``count`` columns of rows [BLOCK_M, BLOCK_N], 0 outside ``in_row``.

    The mean of equal values is that value to the bit. Their sum is rounded, and the quotient off by
    several ulps; the rest is small, and its mean accurate.
    """
    mean = tl.sum(x, 1) / count
    return mean + tl.sum(tl.where(in_row, x - mean[:, None], 0.0), 1) / count


@triton.jit
def no_tiles():
    """Begin a tuple, to which a row's tiles are added."""
    return ()


@triton.jit
def mean_of_parts(parts, n_columns):
    """Compute the mean of rows, given in tiles [BLOCK_M, BLOCK_N] that are 0 outside.

    The mean of equal values is that value to the bit. Their sum is rounded, and the quotient off by
    several ulps; the rest is small, and its mean accurate.
    """
    total = parts[0]
    for part in tl.static_range(1, len(parts)):
        total += parts[part]
    mean = tl.sum(total, 1) / n_columns
    total = _centered(parts, 0, mean, n_columns)
    for part in tl.static_range(1, len(parts)):
        total += _centered(parts, part, mean, n_columns)
    return mean + tl.sum(total, 1) / n_columns


@triton.jit
def variance_of_parts(parts, mean, n_columns):
    """Compute the mean square of rows around ``mean`` [BLOCK_M], as :func:`mean_of_parts`."""
    centered = _centered(parts, 0, mean, n_columns)
    total = centered * centered
    for part in tl.static_range(1, len(parts)):
        centered = _centered(parts, part, mean, n_columns)
        total = fma(centered, centered, total)
    return tl.sum(total, 1) / n_columns


@triton.jit
def _centered(parts, AT: tl.constexpr, mean, n_columns):
    """Subtract the mean from a part of rows; 0 outside, where only the last part has columns."""
    centered = parts[AT] - mean[:, None]
    if AT == len(parts) - 1:
        BLOCK_N: tl.constexpr = centered.shape[1]
        in_row = AT * BLOCK_N + tl.arange(0, BLOCK_N) < n_columns
        centered = tl.where(in_row[None, :], centered, 0.0)
    return centered


@triton.jit
def zero_sums(PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Make what :func:`store_partials` takes of each part of a row, all zero."""
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = no_tiles()
    for _ in tl.static_range(PARTS):
        sums += ((zero, zero, zero),)
    return sums


@triton.jit
def column_sums(tile):
    """Sum up to 64 rows of a tile [BLOCK_M, BLOCK_N], its lower half on its upper half, and again.

    For a reduction warps would write to shared memory by columns, which all lie in one bank where a
    thread has eight neighbours. Halves are exchanged by rows, without conflicts.
    """
    for _ in tl.static_range(6):
        if tile.shape[0] > 1:
            halves = tl.reshape(tile, [2, tile.shape[0] // 2, tile.shape[1]])
            first, second = tl.split(tl.permute(halves, [1, 2, 0]))
            tile = first + second
    return tl.reshape(tile, [tile.shape[1]])


@triton.jit
def add_to_sums(sums, dy, normed, NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr):
    """Add tiles to the sums of a part for weight and bias, those that are asked for."""
    dweight, dbias, dinput_bias = sums
    if NEEDS_WEIGHT:
        dweight = fma(dy, normed, dweight)
    if NEEDS_BIAS:
        dbias += dy
    return dweight, dbias, dinput_bias


@triton.jit
def store_partials(
    partials_ptr, sums, first_column, n_columns, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr, NEEDS_INPUT_BIAS: tl.constexpr,
):
    """Write one program's column sums, a row for each asked for.

    ``sums`` are the tiles for weight, bias and input bias of each part.
    """
    for part in tl.static_range(PARTS):
        dweight, dbias, dinput_bias = sums[part]
        columns = first_column + part * BLOCK_N + tl.arange(0, BLOCK_N)
        in_row = columns < n_columns
        row_ptr = partials_ptr
        if NEEDS_WEIGHT:
            tl.store(row_ptr + columns, column_sums(dweight), mask=in_row)
            row_ptr += n_columns
        if NEEDS_BIAS:
            tl.store(row_ptr + columns, column_sums(dbias), mask=in_row)
            row_ptr += n_columns
        if NEEDS_INPUT_BIAS:
            tl.store(row_ptr + columns, column_sums(dinput_bias), mask=in_row)


@triton.jit(do_not_specialize=COUNTS)
def _sum_partials(
    partials_ptr, first_ptr, second_ptr, third_ptr, n_rows, n_columns, n_sums,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_last(OVERLAPS)
    blocks = tl.cdiv(n_columns, BLOCK_N)
    which = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    partials_ptr += which * n_columns
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, n_rows, BLOCK_M, num_stages=STAGES):
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


def sum_partials(
    partials: torch.Tensor, dtype: torch.dtype = torch.float32, overlaps: bool = False
) -> torch.Tensor:
    """Sum columns of float32 ``[rows, columns]``, contiguous, to ``[columns]`` of ``dtype``."""
    return sums_of_partials(partials, 1, dtype, overlaps)[0]


def sums_of_partials(
    partials: torch.Tensor, count: int, dtype: torch.dtype, overlaps: bool = False
) -> list[torch.Tensor]:
    """Sum columns in up to three neighbouring parts, to tensors that share no memory.

    With ``overlaps`` the last launch left the partial sums, and lets this one begin early.
    """
    n_rows, n_columns = partials.shape[0], partials.shape[1] // count
    sums = [partials.new_empty(n_columns, dtype=dtype) for _ in range(count)]
    block_n = 32  # a line of the cache
    if n_columns:
        config = targets.OverlappingConfig(8) if overlaps else targets.LaunchConfig(8)
        launch(
            _sum_partials, (targets.ceil_div(n_columns, block_n) * count,), config,
            partials, *sums, *[None] * (3 - count), n_rows, n_columns, count,
            BLOCK_M=128, BLOCK_N=block_n, STAGES=4, OVERLAPS=overlaps,
        )
    return sums
