"""Scale what a block adds to a residual by columns (LayerScale) and by samples (stochastic depth).

    z = sample_scale * scale * dropout(x + input_bias) + residual

``scale`` and ``input_bias`` have an element a column, ``sample_scale`` one for all rows of a
sample.

Forward: a program per [BLOCK_M, BLOCK_N] tile reads x and residual once and writes z once.
Backward: programs walk the rows of a block of columns, read dz and, for the gradient of scale, x,
write dx and keep the gradients of scale and input bias in registers; :mod:`reduction` adds their
partial sums. The gradient of residual is dz itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.rows.reduction import column_sums, sums_of_partials
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import COUNTS, dropout_keep, dropout_scale, fma, store
from fusedformer_kernels.runtime.strided import contiguous_like, contiguous_vector, rows_of


class Factors(NamedTuple):
    """What x is multiplied with; nothing is compiled for what is None."""

    scale: Any
    sample_scale: Any
    seed: Any  # of dropout
    p: Any
    rows: Any  # of a sample


@triton.jit
def _load_rows(ptr, stride, rows, columns, valid):
    """Load a tile [BLOCK_M, BLOCK_N] in float32, 0 outside."""
    tile = tl.load(ptr + (rows * stride)[:, None] + columns[None, :], mask=valid, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _load_columns(ptr, columns, in_row):
    """Load a parameter [BLOCK_N] in float32, 0 outside."""
    return tl.load(ptr + columns, mask=in_row, other=0.0).to(tl.float32)


@triton.jit
def _row_factors(factors, rows, first_column, row_valid, BLOCK_N: tl.constexpr):
    """Load what dropout and the samples multiply a tile [BLOCK_M, BLOCK_N] with."""
    found = tl.full([rows.shape[0], BLOCK_N], 1.0, tl.float32)
    if factors.seed is not None:
        keep = dropout_keep(tl.load(factors.seed), 0, rows, first_column, factors.p, BLOCK_N)
        found = tl.where(keep, dropout_scale(factors.p), 0.0)
    if factors.sample_scale is not None:
        sample = tl.load(factors.sample_scale + rows // factors.rows, mask=row_valid, other=0.0)
        found *= sample.to(tl.float32)[:, None]
    return found


@triton.jit(do_not_specialize=COUNTS)
def _scaled_sum_forward(
    x_ptr, bias_ptr, residual_ptr, z_ptr, factors, n_rows, n_columns, stride_x, stride_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    column_blocks = tl.cdiv(n_columns, BLOCK_N)
    first_column = (tl.program_id(0) % column_blocks) * BLOCK_N
    rows = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row, row_valid = columns < n_columns, rows < n_rows
    valid = row_valid[:, None] & in_row[None, :]
    x = _load_rows(x_ptr, stride_x, rows, columns, valid)  # [BLOCK_M, BLOCK_N]
    if bias_ptr is not None:
        x += _load_columns(bias_ptr, columns, in_row)[None, :]
    x *= _row_factors(factors, rows, first_column, row_valid, BLOCK_N)
    z = _load_rows(residual_ptr, stride_residual, rows, columns, valid)
    if factors.scale is not None:
        z = fma(x, _load_columns(factors.scale, columns, in_row)[None, :], z)
    else:
        z += x
    store(z_ptr + (rows * n_columns)[:, None] + columns[None, :], z, valid)


@triton.jit(do_not_specialize=COUNTS)
def _scaled_sum_backward(
    dz_ptr, x_ptr, bias_ptr, dx_ptr, partials_ptr, factors, n_rows, n_columns, n_partial,
    stride_dz, stride_x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NEEDS_SCALE: tl.constexpr, NEEDS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):
    first_column = tl.program_id(1) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    dscale = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in tl.range(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES
    ):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        row_valid = rows < n_rows
        valid = row_valid[:, None] & in_row[None, :]
        grad = _load_rows(dz_ptr, stride_dz, rows, columns, valid)  # of scale * x, in the end
        grad *= _row_factors(factors, rows, first_column, row_valid, BLOCK_N)
        if NEEDS_SCALE:
            x = _load_rows(x_ptr, stride_x, rows, columns, valid)
            if bias_ptr is not None:
                x += _load_columns(bias_ptr, columns, in_row)[None, :]
            dscale = fma(grad, x, dscale)
        if factors.scale is not None:
            grad *= _load_columns(factors.scale, columns, in_row)[None, :]
        store(dx_ptr + (rows * n_columns)[:, None] + columns[None, :], grad, valid)
        if NEEDS_BIAS:
            dbias += grad  # 0 in rows that there are not, as dz is
    partials_ptr += tl.program_id(0).to(tl.int64) * n_partial
    if NEEDS_SCALE:
        tl.store(partials_ptr + columns, column_sums(dscale), mask=in_row)
        partials_ptr += n_columns
    if NEEDS_BIAS:
        tl.store(partials_ptr + columns, column_sums(dbias), mask=in_row)


def _factors(scale: Any, sample_scale: Any, seed: Any, p: float, n_rows: int) -> Factors:
    rows = 1 if sample_scale is None else n_rows // sample_scale.shape[0]
    return Factors(contiguous_vector(scale), contiguous_vector(sample_scale), seed, p, rows)


@planned
def scaled_sum_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    scale: torch.Tensor | None,
    sample_scale: torch.Tensor | None,
    input_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
) -> torch.Tensor:
    """Compute z, contiguous, in the widest of the dtypes of ``x``, ``residual`` and ``scale``.

    ``sample_scale`` has an element for each index of the first dimension of ``x``.
    """
    dtype = torch.promote_types(x.dtype, residual.dtype)
    z = contiguous_like(x, dtype if scale is None else torch.promote_types(dtype, scale.dtype))
    if z.numel() == 0:
        return z
    n_columns = x.shape[-1]
    x_rows, residual_rows = rows_of(x, n_columns), rows_of(residual, n_columns)
    n_rows = x_rows.shape[0]
    config = configs.elementwise_tile("scaled_sum_forward", n_columns, targets.target_of(x.device))
    blocks = targets.ceil_div(n_rows, config.block_m) * targets.ceil_div(n_columns, config.block_n)
    factors = _factors(scale, sample_scale, seed, p, n_rows)
    launch(
        _scaled_sum_forward, (blocks,), config, x_rows,
        contiguous_vector(input_bias, n_columns), residual_rows, z, factors, n_rows, n_columns,
        x_rows.stride(0), residual_rows.stride(0),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )
    return z


@planned
def scaled_sum_backward(
    dz: torch.Tensor,
    x: torch.Tensor | None,
    scale: torch.Tensor | None,
    sample_scale: torch.Tensor | None,
    input_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    needs_scale: bool,
    needs_input_bias: bool,
    input_dtype: torch.dtype,
    parameter_dtype: torch.dtype,
) -> tuple[torch.Tensor | None, ...]:
    """Compute (dx in ``input_dtype``, dscale, dinput_bias) from the gradient of z.

    The gradients of parameters, None where not asked for, have ``parameter_dtype``; only that of
    ``scale`` needs ``x``.
    """
    dx = contiguous_like(dz, input_dtype)
    n_columns = dz.shape[-1]
    wanted = [needs_scale, needs_input_bias]
    if dx.numel() == 0:
        sums = [dz.new_zeros(n_columns, dtype=parameter_dtype) for _ in range(sum(wanted))]
    else:
        dz_rows = rows_of(dz, n_columns)
        n_rows = dz_rows.shape[0]
        x_rows = None if x is None or not needs_scale else rows_of(x, n_columns)
        target = targets.target_of(dz.device)
        config = configs.column_tile("scaled_sum_backward", n_columns, 8, target)
        column_blocks = targets.ceil_div(n_columns, config.block_n)
        programs = configs.column_programs(n_rows, column_blocks, config, target)
        partials = dz.new_empty((programs, sum(wanted) * n_columns), dtype=torch.float32)
        factors = _factors(scale, sample_scale, seed, p, n_rows)
        launch(
            _scaled_sum_backward, (programs, column_blocks), config, dz_rows, x_rows,
            contiguous_vector(input_bias), dx, partials, factors, n_rows, n_columns,
            partials.shape[1], dz_rows.stride(0), 0 if x_rows is None else x_rows.stride(0),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, NEEDS_SCALE=needs_scale,
            NEEDS_BIAS=needs_input_bias, STAGES=config.num_stages,
        )
        sums = sums_of_partials(partials, sum(wanted), parameter_dtype) if any(wanted) else []
    found = iter(sums)
    return dx, *(next(found) if want else None for want in wanted)
