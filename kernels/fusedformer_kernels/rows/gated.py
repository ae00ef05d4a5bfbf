"""Gate an activation: the feed-forward blocks GeGLU, SwiGLU and ReGLU, forward and backward.

    y = dropout(activation(a + bias_a) * (b + bias_b)), where a and b are the halves of each row x

Forward: a program per [BLOCK_M, BLOCK_N] tile of y reads both halves once and writes y once.
Backward: programs walk the rows of a block of columns, recompute the activation and its derivative,
write both halves of dx and keep the gradient of the bias in registers; :mod:`reduction` adds their
partial sums. Reads x and dy, writes dx.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.rows.activation import ACTIVATIONS, activation_and_derivative
from fusedformer_kernels.rows.reduction import column_sums, sum_partials
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    dropout_keep,
    dropout_scale,
    let_next_begin,
    store,
)
from fusedformer_kernels.runtime.strided import contiguous_like, contiguous_vector, rows_of


@triton.jit
def _load_half(x_ptr, rows, columns, stride_x, bias, valid, HAS_BIAS: tl.constexpr):
    """Load a tile of one half, in float32, with its bias added."""
    x = tl.load(x_ptr + (rows * stride_x)[:, None] + columns[None, :], mask=valid, other=0.0)
    x = x.to(tl.float32)  # [BLOCK_M, BLOCK_N]
    if HAS_BIAS:
        x += bias[None, :]
    return x


@triton.jit(do_not_specialize=COUNTS)
def _gated_activation_forward(
    x_ptr, bias_ptr, seed_ptr, y_ptr, p, n_rows, n_columns, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
    ACTIVATES_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):
    column_blocks = tl.cdiv(n_columns, BLOCK_N)
    first_column = (tl.program_id(0) % column_blocks) * BLOCK_N
    rows = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    valid = (rows < n_rows)[:, None] & in_row[None, :]
    first_bias = 0.0
    second_bias = 0.0
    if HAS_BIAS:
        first_bias = tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
        second_bias = tl.load(bias_ptr + n_columns + columns, mask=in_row, other=0.0).to(tl.float32)
    first = _load_half(x_ptr, rows, columns, stride_x, first_bias, valid, HAS_BIAS)
    second = _load_half(x_ptr + n_columns, rows, columns, stride_x, second_bias, valid, HAS_BIAS)
    if ACTIVATES_SECOND:
        activated, _ = activation_and_derivative(second, ACTIVATION)
        y = activated * first
    else:
        activated, _ = activation_and_derivative(first, ACTIVATION)
        y = activated * second
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), 0, rows, first_column, p, BLOCK_N)
        y = tl.where(keep, y * dropout_scale(p), 0.0)
    store(y_ptr + (rows * n_columns)[:, None] + columns[None, :], y, valid)


@triton.jit(do_not_specialize=COUNTS)
def _gated_activation_backward(
    dy_ptr, x_ptr, bias_ptr, seed_ptr, dx_ptr, partials_ptr, p, n_rows, n_columns, stride_dy,
    stride_x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
    ACTIVATES_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):
    let_next_begin(OVERLAPS)
    first_column = tl.program_id(1) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    first_bias = 0.0
    second_bias = 0.0
    if HAS_BIAS:
        first_bias = tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
        second_bias = tl.load(bias_ptr + n_columns + columns, mask=in_row, other=0.0).to(tl.float32)
    first_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in tl.range(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES
    ):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        valid = (rows < n_rows)[:, None] & in_row[None, :]
        first = _load_half(x_ptr, rows, columns, stride_x, first_bias, valid, HAS_BIAS)
        second = _load_half(
            x_ptr + n_columns, rows, columns, stride_x, second_bias, valid, HAS_BIAS
        )
        dy_offsets = (rows * stride_dy)[:, None] + columns[None, :]
        dy = tl.load(dy_ptr + dy_offsets, mask=valid, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), 0, rows, first_column, p, BLOCK_N)
            dy = tl.where(keep, dy * dropout_scale(p), 0.0)
        if ACTIVATES_SECOND:
            activated, derivative = activation_and_derivative(second, ACTIVATION)
            dfirst = dy * activated
            dsecond = dy * first * derivative
        else:
            activated, derivative = activation_and_derivative(first, ACTIVATION)
            dfirst = dy * second * derivative
            dsecond = dy * activated
        dx_ptrs = dx_ptr + (rows * 2 * n_columns)[:, None] + columns[None, :]
        store(dx_ptrs, dfirst, valid)
        store(dx_ptrs + n_columns, dsecond, valid)
        if NEEDS_BIAS:
            first_sum += dfirst  # 0 in rows that there are not, as dy is
            second_sum += dsecond
    if NEEDS_BIAS:
        row_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * 2 * n_columns
        tl.store(row_ptr + columns, column_sums(first_sum), mask=in_row)
        tl.store(row_ptr + n_columns + columns, column_sums(second_sum), mask=in_row)


@planned
def gated_activation_forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    activation: str,
    activates_second: bool,
) -> torch.Tensor:
    """Compute ``dropout(activation(a) * b)`` of the halves of ``x + bias``, half as wide."""
    n_columns = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], n_columns)
    if y.numel() == 0:
        return y
    x_rows = rows_of(x, 2 * n_columns)
    n_rows = x_rows.shape[0]
    bias = contiguous_vector(bias, 2 * n_columns)
    config = configs.elementwise_tile("gated_forward", n_columns, targets.target_of(x.device))
    blocks = targets.ceil_div(n_rows, config.block_m) * targets.ceil_div(n_columns, config.block_n)
    launch(
        _gated_activation_forward, (blocks,), config,
        x_rows, bias, seed, y, p, n_rows, n_columns, x_rows.stride(0),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, ACTIVATION=ACTIVATIONS[activation],
        ACTIVATES_SECOND=activates_second, HAS_BIAS=bias is not None, DROPOUT=seed is not None,
    )
    return y


@planned
def gated_activation_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    activation: str,
    activates_second: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute (dx, dbias in the dtype of ``bias`` if needed) from the output's gradient."""
    dx = contiguous_like(x)
    wants_bias = needs_bias and bias is not None
    if dx.numel() == 0:
        return dx, torch.zeros_like(bias) if needs_bias and bias is not None else None
    n_columns = x.shape[-1] // 2
    x_rows, dy_rows = rows_of(x, 2 * n_columns), rows_of(dy, n_columns)
    bias = contiguous_vector(bias)
    n_rows = x_rows.shape[0]
    target = targets.target_of(x.device)
    config = configs.column_tile("gated_backward", n_columns, 8, target)
    column_blocks = targets.ceil_div(n_columns, config.block_n)
    programs = configs.column_programs(n_rows, column_blocks, config, target)
    overlaps = target.overlaps and wants_bias
    shape = (programs if wants_bias else 0, 2 * n_columns)
    partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    launch(
        _gated_activation_backward, (programs, column_blocks), config,
        dy_rows, x_rows, bias, seed, dx, partials, p, n_rows, n_columns, dy_rows.stride(0),
        x_rows.stride(0), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        ACTIVATION=ACTIVATIONS[activation], ACTIVATES_SECOND=activates_second,
        HAS_BIAS=bias is not None, DROPOUT=seed is not None, NEEDS_BIAS=wants_bias,
        STAGES=config.num_stages, OVERLAPS=overlaps,
    )
    dbias = None
    if needs_bias and bias is not None:
        dbias = sum_partials(partials, bias.dtype, overlaps)
    return dx, dbias
