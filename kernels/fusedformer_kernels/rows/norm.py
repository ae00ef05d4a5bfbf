"""LayerNorm and RMSNorm, alone or on ``dropout(x + input_bias) + residual``, forward and backward.

    z = dropout(x + input_bias) + residual
    layer:  y = (z - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
    rms:    y = z * rstd * weight,                   rstd = 1 / sqrt(mean(z**2) + eps)
    none:   only z

Forward: a program per BLOCK_M rows, kept in registers (a row of more than 16,384 columns is read
twice in chunks). It moves what it must: x, residual in; y, z out; two floats a row.
Backward: persistent programs walk the rows and keep the sums for weight, bias and input bias in
registers; each leaves one partial row, which :mod:`reduction` adds up in a fixed order. Rows of
more than 8,192 columns take two kernels, one by rows and one by columns.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows.reduction import row_mean, store_partials, sums_of_partials
from fusedformer_kernels.runtime import configs
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    cast,
    dropout_keep,
    dropout_scale,
    fma,
    negative,
    store,
)
from fusedformer_kernels.runtime.strided import contiguous_like, contiguous_vector, rows_of

KINDS = {"none": 0, "layer": 1, "rms": 2}
_LAYER = tl.constexpr(1)


@triton.jit
def _load_sum(
    x_ptr, residual_ptr, input_bias_ptr, seed_ptr, p, rows, first_column, n_columns, row_valid,
    stride_x, stride_residual, BLOCK_N: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_INPUT_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):
    """float32 tile of ``dropout(x + input_bias) + residual``, 0 outside. [BLOCK_M, BLOCK_N]."""
    columns = first_column + tl.arange(0, BLOCK_N)
    in_row = columns < n_columns
    valid = row_valid[:, None] & in_row[None, :]
    z = tl.load(x_ptr + (rows * stride_x)[:, None] + columns[None, :], mask=valid, other=0.0)
    z = z.to(tl.float32)
    if HAS_INPUT_BIAS:
        z += tl.load(input_bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), 0, rows, first_column, p, BLOCK_N)
        z = tl.where(keep, z * dropout_scale(p), 0.0)
    if HAS_RESIDUAL:
        offsets = (rows * stride_residual)[:, None] + columns[None, :]
        z += tl.load(residual_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    if HAS_INPUT_BIAS:  # without it the loads put 0 where it belongs
        z = tl.where(valid, z, 0.0)
    return z


@triton.jit
def _store_sum(z_ptr, z, rows, columns, n_columns, row_valid):
    """Write the tile ``z`` [BLOCK_M, BLOCK_N]; return the mean [BLOCK_M] of what rounding added."""
    in_row = (columns < n_columns)[None, :]
    offsets = (rows * n_columns)[:, None] + columns[None, :]
    stored = cast(z, z_ptr.dtype.element_ty)
    tl.store(z_ptr + offsets, stored, mask=row_valid[:, None] & in_row)
    return tl.sum(tl.where(in_row, stored.to(tl.float32) - z, 0.0), 1) / n_columns


@triton.jit
def affine(
    normed, weight_ptr, bias_ptr, columns, in_row, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """``normed * weight + bias`` of a tile [BLOCK_M, BLOCK_N]."""
    y = normed
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            y = fma(y, weight, bias)
        else:
            y *= weight
    elif HAS_BIAS:
        y += bias
    return y


@triton.jit
def _store_normed(
    y_ptr, z, mean, rstd, weight_ptr, bias_ptr, rows, first_column, n_columns, row_valid,
    BLOCK_N: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """Write the norm of the tile ``z`` [BLOCK_M, BLOCK_N] from statistics [BLOCK_M]."""
    columns = first_column + tl.arange(0, BLOCK_N)
    in_row = columns < n_columns
    y = affine(
        (z - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, columns, in_row, HAS_WEIGHT,
        HAS_BIAS,
    )
    offsets = (rows * n_columns)[:, None] + columns[None, :]
    store(y_ptr + offsets, y, row_valid[:, None] & in_row[None, :])


@triton.jit(do_not_specialize=COUNTS)
def _norm_forward(
    x_ptr, residual_ptr, input_bias_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, z_ptr, mean_ptr,
    rstd_ptr, p, eps, n_rows, n_columns, stride_x, stride_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_PASS: tl.constexpr, KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_INPUT_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_valid = rows < n_rows
    mean = tl.zeros([BLOCK_M], tl.float32)
    rounding = tl.zeros([BLOCK_M], tl.float32)
    if ONE_PASS:
        z = _load_sum(
            x_ptr, residual_ptr, input_bias_ptr, seed_ptr, p, rows, 0, n_columns, row_valid,
            stride_x, stride_residual, BLOCK_N, HAS_RESIDUAL, HAS_INPUT_BIAS, DROPOUT,
        )  # [BLOCK_M, BLOCK_N]
        columns = tl.arange(0, BLOCK_N)
        in_row = (columns < n_columns)[None, :]
        if z_ptr is not None:
            rounding = _store_sum(z_ptr, z, rows, columns, n_columns, row_valid)
        if KIND != 0:
            if KIND == _LAYER:
                mean = row_mean(z, in_row, n_columns)
            centered = tl.where(in_row, z - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / n_columns + eps)
            _store_normed(
                y_ptr, z, mean, rstd, weight_ptr, bias_ptr, rows, 0, n_columns, row_valid,
                BLOCK_N, HAS_WEIGHT, HAS_BIAS,
            )
    else:
        squares = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, n_columns, BLOCK_N):
            z = _load_sum(
                x_ptr, residual_ptr, input_bias_ptr, seed_ptr, p, rows, start, n_columns,
                row_valid, stride_x, stride_residual, BLOCK_N, HAS_RESIDUAL, HAS_INPUT_BIAS,
                DROPOUT,
            )  # [BLOCK_M, BLOCK_N]
            columns = start + tl.arange(0, BLOCK_N)
            in_row = (columns < n_columns)[None, :]
            if z_ptr is not None:
                rounding += _store_sum(z_ptr, z, rows, columns, n_columns, row_valid)
            if KIND == _LAYER:
                # Chan, Golub and LeVeque's update: means and squared deviations of two parts.
                count = tl.minimum(n_columns - start, BLOCK_N).to(tl.float32)
                part = row_mean(z, in_row, count)
                deviation = tl.where(in_row, z - part[:, None], 0.0)
                shift = part - mean
                share = count / (start + count)
                squares += tl.sum(deviation * deviation, 1) + shift * (start * share) * shift
                mean += shift * share
            else:
                squares += tl.sum(z * z, 1)
        if KIND != 0:
            rstd = 1.0 / tl.sqrt(squares / n_columns + eps)
            for start in range(0, n_columns, BLOCK_N):
                z = _load_sum(
                    x_ptr, residual_ptr, input_bias_ptr, seed_ptr, p, rows, start, n_columns,
                    row_valid, stride_x, stride_residual, BLOCK_N, HAS_RESIDUAL, HAS_INPUT_BIAS,
                    DROPOUT,
                )  # [BLOCK_M, BLOCK_N]
                _store_normed(
                    y_ptr, z, mean, rstd, weight_ptr, bias_ptr, rows, start, n_columns, row_valid,
                    BLOCK_N, HAS_WEIGHT, HAS_BIAS,
                )
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=row_valid)
        if KIND == _LAYER:  # the mean of what the backward will read
            tl.store(mean_ptr + rows, mean + rounding, mask=row_valid)


@triton.jit
def _load_statistics(mean_ptr, rstd_ptr, rows, row_valid, KIND: tl.constexpr):
    """(mean, rstd) of rows [BLOCK_M], 0 where the kind has none."""
    mean = tl.zeros(rows.shape, tl.float32)
    rstd = tl.zeros(rows.shape, tl.float32)
    if KIND == _LAYER:
        mean = tl.load(mean_ptr + rows, mask=row_valid, other=0.0)
    if KIND != 0:
        rstd = tl.load(rstd_ptr + rows, mask=row_valid, other=0.0)
    return mean, rstd


@triton.jit
def _load_normed_and_grad(
    dy_ptr, z_ptr, mean, rstd, rows, columns, n_columns, row_valid, stride_dy, stride_z,
    KIND: tl.constexpr,
):
    """float32 (normalized z, dy) of a tile [BLOCK_M, BLOCK_N], both 0 outside."""
    valid = row_valid[:, None] & (columns < n_columns)[None, :]
    normed = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    dy = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    if KIND != 0:
        z = tl.load(z_ptr + (rows * stride_z)[:, None] + columns[None, :], mask=valid, other=0.0)
        normed = tl.where(valid, (z.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        offsets = (rows * stride_dy)[:, None] + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    return normed, dy


@triton.jit
def store_input_grads(
    normed, weighted, mean_product, mean_weighted, rstd, sum_grad_ptr, dz_ptr, dx_ptr, seed_ptr,
    p, rows, first_column, n_columns, row_valid, stride_sum_grad, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, HAS_SUM_GRAD: tl.constexpr, DROPOUT: tl.constexpr,
):
    """Write dz, and dx where it differs; return dx as float32 [BLOCK_M, BLOCK_N]."""
    columns = first_column + tl.arange(0, BLOCK_N)
    valid = row_valid[:, None] & (columns < n_columns)[None, :]
    dz = fma(normed, negative(mean_product)[:, None], weighted - mean_weighted[:, None])
    dz *= rstd[:, None]
    if HAS_SUM_GRAD:
        offsets = (rows * stride_sum_grad)[:, None] + columns[None, :]
        dz += tl.load(sum_grad_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    dz = tl.where(valid, dz, 0.0)
    offsets = (rows * n_columns)[:, None] + columns[None, :]
    store(dz_ptr + offsets, dz, valid)
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), 0, rows, first_column, p, BLOCK_N)
        dz = tl.where(keep, dz * dropout_scale(p), 0.0)
    if dx_ptr is not None:
        store(dx_ptr + offsets, dz, valid)
    return dz


@triton.jit(do_not_specialize=COUNTS)
def _norm_backward(
    dy_ptr, sum_grad_ptr, z_ptr, mean_ptr, rstd_ptr, weight_ptr, seed_ptr, dz_ptr, dx_ptr,
    partials_ptr, p, n_rows, n_columns, stride_dy, stride_sum_grad, stride_z, n_partial,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, HAS_SUM_GRAD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, DROPOUT: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, NEEDS_INPUT_BIAS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dinput_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        row_valid = rows < n_rows
        mean, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, row_valid, KIND)
        normed, dy = _load_normed_and_grad(
            dy_ptr, z_ptr, mean, rstd, rows, columns, n_columns, row_valid, stride_dy, stride_z,
            KIND,
        )  # [BLOCK_M, BLOCK_N]
        weighted = dy
        if HAS_WEIGHT:
            weighted = dy * weight[None, :]
        mean_product = tl.sum(weighted * normed, 1) / n_columns  # [BLOCK_M]
        mean_weighted = tl.zeros([BLOCK_M], tl.float32)
        if KIND == _LAYER:
            mean_weighted = tl.sum(weighted, 1) / n_columns
        dx = store_input_grads(
            normed, weighted, mean_product, mean_weighted, rstd, sum_grad_ptr, dz_ptr, dx_ptr,
            seed_ptr, p, rows, 0, n_columns, row_valid, stride_sum_grad, BLOCK_N, KIND,
            HAS_SUM_GRAD, DROPOUT,
        )
        if NEEDS_WEIGHT:
            dweight = fma(dy, normed, dweight)
        if NEEDS_BIAS:
            dbias += dy
        if NEEDS_INPUT_BIAS:
            dinput_bias += dx
    store_partials(
        partials_ptr + tl.program_id(0) * n_partial, columns, n_columns, dweight, dbias,
        dinput_bias, NEEDS_WEIGHT, NEEDS_BIAS, NEEDS_INPUT_BIAS,
    )


@triton.jit(do_not_specialize=COUNTS)
def _norm_backward_long_rows(
    dy_ptr, sum_grad_ptr, z_ptr, mean_ptr, rstd_ptr, weight_ptr, seed_ptr, dz_ptr, dx_ptr, p,
    n_rows, n_columns, stride_dy, stride_sum_grad, stride_z,
    BLOCK_N: tl.constexpr, KIND: tl.constexpr, HAS_SUM_GRAD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, DROPOUT: tl.constexpr,
):
    """Input gradients of one row a program, in chunks."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # [1]
    row_valid = rows < n_rows
    mean, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, row_valid, KIND)
    mean_product = tl.zeros([1], tl.float32)
    mean_weighted = tl.zeros([1], tl.float32)
    if KIND != 0:
        for start in range(0, n_columns, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            normed, weighted = _load_normed_and_grad(
                dy_ptr, z_ptr, mean, rstd, rows, columns, n_columns, row_valid, stride_dy,
                stride_z, KIND,
            )  # [1, BLOCK_N]
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + columns, mask=columns < n_columns, other=0.0)
                weighted *= weight.to(tl.float32)[None, :]
            mean_product += tl.sum(weighted * normed, 1) / n_columns
            if KIND == _LAYER:
                mean_weighted += tl.sum(weighted, 1) / n_columns
    for start in range(0, n_columns, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        normed, weighted = _load_normed_and_grad(
            dy_ptr, z_ptr, mean, rstd, rows, columns, n_columns, row_valid, stride_dy, stride_z,
            KIND,
        )  # [1, BLOCK_N]
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + columns, mask=columns < n_columns, other=0.0)
            weighted *= weight.to(tl.float32)[None, :]
        store_input_grads(
            normed, weighted, mean_product, mean_weighted, rstd, sum_grad_ptr, dz_ptr, dx_ptr,
            seed_ptr, p, rows, start, n_columns, row_valid, stride_sum_grad, BLOCK_N, KIND,
            HAS_SUM_GRAD, DROPOUT,
        )


@triton.jit(do_not_specialize=COUNTS)
def _norm_backward_long_columns(
    dy_ptr, z_ptr, mean_ptr, rstd_ptr, dx_ptr, partials_ptr, n_rows, n_columns, stride_dy,
    stride_z, n_partial, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr, NEEDS_INPUT_BIAS: tl.constexpr,
):
    """Partial sums over rows for a block of columns; the input bias sums the dx written before."""
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dinput_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        row_valid = rows < n_rows
        if NEEDS_WEIGHT or NEEDS_BIAS:
            mean, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, row_valid, KIND)
            normed, dy = _load_normed_and_grad(
                dy_ptr, z_ptr, mean, rstd, rows, columns, n_columns, row_valid, stride_dy,
                stride_z, KIND,
            )  # [BLOCK_M, BLOCK_N]
            dweight = fma(dy, normed, dweight)
            dbias += dy
        if NEEDS_INPUT_BIAS:
            offsets = (rows * n_columns)[:, None] + columns[None, :]
            valid = row_valid[:, None] & in_row[None, :]
            dinput_bias += tl.load(dx_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    store_partials(
        partials_ptr + tl.program_id(0) * n_partial, columns, n_columns, dweight, dbias,
        dinput_bias, NEEDS_WEIGHT, NEEDS_BIAS, NEEDS_INPUT_BIAS,
    )


@planned
def norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    input_bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
    kind: str,
    dims: int,
    wants_sum: bool,
    wants_statistics: bool,
    norm_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """(y, z, mean, rstd) over the last ``dims`` dimensions of ``x``.

    y and rstd are None for kind "none", mean unless the kind is "layer", z without a residual;
    and what is not wanted. y and z are contiguous in the wider of the dtypes of ``x`` and
    ``residual``, y in ``norm_dtype`` if it is given; mean and rstd are float32 ``[rows]``.
    """
    n_columns = math.prod(x.shape[-dims:])
    n_rows = math.prod(x.shape[:-dims])
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = z = mean = rstd = None
    if kind != "none":
        y = contiguous_like(x, norm_dtype or dtype)
    if residual is not None and wants_sum:
        z = contiguous_like(x, dtype)
    if kind != "none" and wants_statistics:
        rstd = x.new_empty(n_rows, dtype=torch.float32)
        mean = torch.empty_like(rstd) if kind == "layer" else None
    if x.numel() > 0:
        x_rows = rows_of(x, n_columns)
        residual_rows = None if residual is None else rows_of(residual, n_columns)
        config = configs.row_tile(
            "norm_forward", n_columns, configs.NORM_ONE_PASS, 2048, 16, configs.target_of(x.device)
        )
        launch(
            _norm_forward, (configs.ceil_div(n_rows, config.block_m),), config,
            x_rows, residual_rows, _flat(input_bias), _flat(weight), _flat(bias), seed, y, z, mean,
            rstd, p, eps, n_rows, n_columns, x_rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, ONE_PASS=n_columns <= config.block_n,
            KIND=KINDS[kind], HAS_RESIDUAL=residual is not None,
            HAS_INPUT_BIAS=input_bias is not None, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, DROPOUT=seed is not None,
        )
    return y, z, mean, rstd


@planned
def norm_backward(
    dy: torch.Tensor | None,
    sum_grad: torch.Tensor | None,
    z: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    weight: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    kind: str,
    dims: int,
    needs_weight: bool,
    needs_bias: bool,
    needs_input_bias: bool,
    input_dtype: torch.dtype,
    parameter_dtype: torch.dtype,
) -> tuple[torch.Tensor | None, ...]:
    """(dz, dx if dropout or its dtype makes it differ, dweight, dbias, dinput_bias).

    ``sum_grad`` is the gradient that reaches z itself. dz is contiguous in the dtype of ``z``, dx
    in ``input_dtype``; the gradients of parameters, None where not asked for, have the normalized
    shape and ``parameter_dtype``.
    """
    shape = z.shape[-dims:]
    n_columns = math.prod(shape)
    n_rows = math.prod(z.shape[:-dims])
    device = z.device
    if dy is None:
        kind = "none"
    mean = mean if kind == "layer" else None
    rstd = None if kind == "none" else rstd
    dz = contiguous_like(z)
    dx = None
    if seed is not None or input_dtype != z.dtype:
        dx = contiguous_like(z, input_dtype)
    wanted = [needs_weight, needs_bias, needs_input_bias]
    if z.numel() == 0:
        sums = [z.new_zeros(n_columns, dtype=parameter_dtype) for _ in range(sum(wanted))]
        return dz, dx, *_distribute(sums, wanted, shape)
    target = configs.target_of(device)
    longest = configs.NORM_BACKWARD_ONE_PASS
    if seed is not None:
        longest = configs.NORM_DROPOUT_BACKWARD_ONE_PASS
    config = configs.row_tile("norm_backward", n_columns, longest, 4096, 16, target)
    one_pass = n_columns <= config.block_n
    block_m = config.block_m if one_pass else 8
    row_blocks = configs.ceil_div(n_rows, block_m)
    programs = configs.row_programs(row_blocks, target)
    partials = torch.empty((programs, sum(wanted) * n_columns), dtype=torch.float32, device=device)
    dy_rows = None if dy is None else rows_of(dy, n_columns)
    sum_grad_rows = None if sum_grad is None else rows_of(sum_grad, n_columns)
    z_rows = rows_of(z, n_columns)
    stride_dy = 0 if dy_rows is None else dy_rows.stride(0)
    stride_sum_grad = 0 if sum_grad_rows is None else sum_grad_rows.stride(0)
    needs = {
        "NEEDS_WEIGHT": needs_weight, "NEEDS_BIAS": needs_bias,
        "NEEDS_INPUT_BIAS": needs_input_bias,
    }  # fmt: skip
    forms = {
        "KIND": KINDS[kind], "HAS_SUM_GRAD": sum_grad is not None,
        "HAS_WEIGHT": weight is not None, "DROPOUT": seed is not None,
    }  # fmt: skip
    weight = _flat(weight)
    if one_pass:
        launch(
            _norm_backward, (programs,), config,
            dy_rows, sum_grad_rows, z_rows, mean, rstd, weight, seed, dz, dx, partials, p, n_rows,
            n_columns, stride_dy, stride_sum_grad, z_rows.stride(0), partials.shape[1],
            BLOCK_M=block_m, BLOCK_N=config.block_n, **forms, **needs,
        )
    else:
        launch(
            _norm_backward_long_rows, (n_rows,), config,
            dy_rows, sum_grad_rows, z_rows, mean, rstd, weight, seed, dz, dx, p, n_rows,
            n_columns, stride_dy, stride_sum_grad, z_rows.stride(0),
            BLOCK_N=config.block_n, **forms,
        )
        if any(wanted):
            block_n = 256
            grid = (programs, configs.ceil_div(n_columns, block_n))
            launch(
                _norm_backward_long_columns, grid, configs.LaunchConfig(4, 2),
                dy_rows, z_rows, mean, rstd, dz if dx is None else dx, partials, n_rows,
                n_columns, stride_dy, z_rows.stride(0), partials.shape[1],
                BLOCK_M=block_m, BLOCK_N=block_n, KIND=KINDS[kind], **needs,
            )
    sums = []
    if any(wanted):
        sums = sums_of_partials(partials, sum(wanted), parameter_dtype)
    return dz, dx, *_distribute(sums, wanted, shape)


def _distribute(
    sums: list[torch.Tensor], wanted: list[bool], shape: torch.Size
) -> list[torch.Tensor | None]:
    rows = iter(sums)
    return [next(rows).view(shape) if want else None for want in wanted]


def _flat(parameter: torch.Tensor | None) -> torch.Tensor | None:
    if parameter is None or parameter.dim() == 1:
        return contiguous_vector(parameter)
    return contiguous_vector(parameter.reshape(-1))
