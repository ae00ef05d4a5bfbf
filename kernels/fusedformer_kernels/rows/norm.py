"""Compute LayerNorm and RMSNorm, alone or on ``dropout(x + input_bias) + residual``, and backward.

    z = dropout(x + input_bias) + residual
    layer:  y = (z - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
    rms:    y = z * rstd * weight,                   rstd = 1 / sqrt(mean(z**2) + eps)
    none:   only z

Forward: a program per BLOCK_M rows, kept in registers (a row of more than 16,384 columns is read
twice in chunks). It reads x and residual, and writes y, z and two floats a row.
Backward: persistent programs walk the rows and keep the sums for weight, bias and input bias in
registers; each leaves one partial row, which :mod:`reduction` adds up in a fixed order. Rows of
more than 8,192 columns take two kernels, one by rows and one by columns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
_NONE, _LAYER = map(tl.constexpr, (KINDS["none"], KINDS["layer"]))


class Inputs(NamedTuple):
    """What the forward's kernel reads; nothing is compiled for what is None."""

    x: Any
    residual: Any
    input_bias: Any
    weight: Any
    bias: Any
    seed: Any  # of dropout
    p: Any
    eps: Any
    x_stride: Any  # elements from a row to the next
    residual_stride: Any


class Saved(NamedTuple):
    """What the backward's kernels read; None as in :class:`Inputs`.

    Without a norm there is neither ``grad`` nor ``rstd``; only layers have a ``mean``.
    """

    grad: Any  # of the norm
    sum_grad: Any  # that reaches z itself
    z: Any
    mean: Any
    rstd: Any
    weight: Any
    seed: Any
    p: Any
    grad_stride: Any
    sum_grad_stride: Any
    z_stride: Any


@triton.jit
def _load_sum(inputs, rows, first_column, n_columns, row_valid, BLOCK_N: tl.constexpr):
    """Load float32 ``dropout(x + input_bias) + residual`` [BLOCK_M, BLOCK_N], 0 outside."""
    columns = first_column + tl.arange(0, BLOCK_N)
    in_row = columns < n_columns
    valid = row_valid[:, None] & in_row[None, :]
    x_rows = inputs.x + (rows * inputs.x_stride)[:, None]
    z = tl.load(x_rows + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    if inputs.input_bias is not None:
        z += tl.load(inputs.input_bias + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if inputs.seed is not None:
        keep = dropout_keep(tl.load(inputs.seed), 0, rows, first_column, inputs.p, BLOCK_N)
        z = tl.where(keep, z * dropout_scale(inputs.p), 0.0)
    if inputs.residual is not None:
        offsets = (rows * inputs.residual_stride)[:, None] + columns[None, :]
        z += tl.load(inputs.residual + offsets, mask=valid, other=0.0).to(tl.float32)
    if inputs.input_bias is not None:  # without it the loads put 0 where it belongs
        z = tl.where(valid, z, 0.0)
    return z


@triton.jit
def _store_sum(z_ptr, z, rows, columns, n_columns, row_valid):
    """Write the tile ``z`` [BLOCK_M, BLOCK_N]; return the mean [BLOCK_M] of its rounding."""
    in_row = (columns < n_columns)[None, :]
    offsets = (rows * n_columns)[:, None] + columns[None, :]
    stored = cast(z, z_ptr.dtype.element_ty)
    tl.store(z_ptr + offsets, stored, mask=row_valid[:, None] & in_row)
    return tl.sum(tl.where(in_row, stored.to(tl.float32) - z, 0.0), 1) / n_columns


@triton.jit
def affine(normed, weight_ptr, bias_ptr, columns, in_row):
    """Compute ``normed * weight + bias`` of a tile [BLOCK_M, BLOCK_N]; either may be None."""
    y = normed
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            y = fma(y, weight, bias)
        else:
            y *= weight
    elif bias_ptr is not None:
        y += bias
    return y


@triton.jit
def _store_normed(y_ptr, z, mean, rstd, inputs, rows, columns, n_columns, row_valid):
    """Write the norm of the tile ``z`` [BLOCK_M, BLOCK_N] from statistics [BLOCK_M]."""
    in_row = columns < n_columns
    y = affine((z - mean[:, None]) * rstd[:, None], inputs.weight, inputs.bias, columns, in_row)
    offsets = (rows * n_columns)[:, None] + columns[None, :]
    store(y_ptr + offsets, y, row_valid[:, None] & in_row[None, :])


@triton.jit(do_not_specialize=COUNTS)
def _norm_forward(
    inputs, y_ptr, z_ptr, mean_ptr, rstd_ptr, n_rows, n_columns, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ONE_PASS: tl.constexpr, KIND: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_valid = rows < n_rows
    mean = tl.zeros([BLOCK_M], tl.float32)
    rounding = tl.zeros([BLOCK_M], tl.float32)
    if ONE_PASS:
        z = _load_sum(inputs, rows, 0, n_columns, row_valid, BLOCK_N)  # [BLOCK_M, BLOCK_N]
        columns = tl.arange(0, BLOCK_N)
        in_row = (columns < n_columns)[None, :]
        if z_ptr is not None:
            rounding = _store_sum(z_ptr, z, rows, columns, n_columns, row_valid)
        if KIND != _NONE:
            if KIND == _LAYER:
                mean = row_mean(z, in_row, n_columns)
            centered = tl.where(in_row, z - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / n_columns + inputs.eps)
            _store_normed(y_ptr, z, mean, rstd, inputs, rows, columns, n_columns, row_valid)
    else:
        squares = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, n_columns, BLOCK_N):
            z = _load_sum(inputs, rows, start, n_columns, row_valid, BLOCK_N)  # [BLOCK_M, BLOCK_N]
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
        if KIND != _NONE:
            rstd = 1.0 / tl.sqrt(squares / n_columns + inputs.eps)
            for start in range(0, n_columns, BLOCK_N):
                z = _load_sum(inputs, rows, start, n_columns, row_valid, BLOCK_N)
                columns = start + tl.arange(0, BLOCK_N)
                _store_normed(y_ptr, z, mean, rstd, inputs, rows, columns, n_columns, row_valid)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=row_valid)
        if KIND == _LAYER:  # the mean of z as the backward will read it
            tl.store(mean_ptr + rows, mean + rounding, mask=row_valid)


@triton.jit
def _load_statistics(saved, rows, row_valid):
    """Load (mean, rstd) of rows [BLOCK_M], 0 where the kind has none."""
    mean = tl.zeros(rows.shape, tl.float32)
    rstd = tl.zeros(rows.shape, tl.float32)
    if saved.mean is not None:
        mean = tl.load(saved.mean + rows, mask=row_valid, other=0.0)
    if saved.rstd is not None:
        rstd = tl.load(saved.rstd + rows, mask=row_valid, other=0.0)
    return mean, rstd


@triton.jit
def _load_normed(saved, mean, rstd, rows, columns, n_columns, row_valid):
    """Load float32 (normalized z, its gradient) of a tile [BLOCK_M, BLOCK_N], both 0 outside."""
    valid = row_valid[:, None] & (columns < n_columns)[None, :]
    normed = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    dy = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    if saved.grad is not None:
        offsets = (rows * saved.z_stride)[:, None] + columns[None, :]
        z = tl.load(saved.z + offsets, mask=valid, other=0.0)
        normed = tl.where(valid, (z.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        offsets = (rows * saved.grad_stride)[:, None] + columns[None, :]
        dy = tl.load(saved.grad + offsets, mask=valid, other=0.0).to(tl.float32)
    return normed, dy


@triton.jit
def _load_weighted(saved, mean, rstd, rows, columns, n_columns, row_valid):
    """Load float32 (normalized z, its gradient times the weight), as :func:`_load_normed`."""
    normed, weighted = _load_normed(saved, mean, rstd, rows, columns, n_columns, row_valid)
    if saved.weight is not None:
        weight = tl.load(saved.weight + columns, mask=columns < n_columns, other=0.0)
        weighted *= weight.to(tl.float32)[None, :]
    return normed, weighted


@triton.jit
def sum_gradient(normed, weighted, mean_product, mean_weighted, rstd):
    """Compute the gradient of z [BLOCK_M, BLOCK_N]; means [BLOCK_M] are those of whole rows.

    ``weighted`` is the gradient of the norm times the weight, ``mean_product`` the mean of that
    times ``normed``; ``mean_weighted`` is 0 where no mean was subtracted.
    """
    dz = fma(normed, negative(mean_product)[:, None], weighted - mean_weighted[:, None])
    return dz * rstd[:, None]


@triton.jit
def _store_input_grads(
    dz, saved, dz_ptr, dx_ptr, rows, first_column, n_columns, row_valid, BLOCK_N: tl.constexpr,
):
    """Add what reaches z itself to ``dz`` and write it, and dx where it differs; return dx.

    Tiles are float32 [BLOCK_M, BLOCK_N].
    """
    columns = first_column + tl.arange(0, BLOCK_N)
    valid = row_valid[:, None] & (columns < n_columns)[None, :]
    if saved.sum_grad is not None:
        offsets = (rows * saved.sum_grad_stride)[:, None] + columns[None, :]
        dz += tl.load(saved.sum_grad + offsets, mask=valid, other=0.0).to(tl.float32)
    dz = tl.where(valid, dz, 0.0)
    offsets = (rows * n_columns)[:, None] + columns[None, :]
    store(dz_ptr + offsets, dz, valid)
    if saved.seed is not None:
        keep = dropout_keep(tl.load(saved.seed), 0, rows, first_column, saved.p, BLOCK_N)
        dz = tl.where(keep, dz * dropout_scale(saved.p), 0.0)
    if dx_ptr is not None:
        store(dx_ptr + offsets, dz, valid)
    return dz


@triton.jit(do_not_specialize=COUNTS)
def _norm_backward(
    saved, dz_ptr, dx_ptr, partials_ptr, n_rows, n_columns, n_partial, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    NEEDS_INPUT_BIAS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    if saved.weight is not None:
        weight = tl.load(saved.weight + columns, mask=columns < n_columns, other=0.0)
        weight = weight.to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dinput_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        row_valid = rows < n_rows
        mean, rstd = _load_statistics(saved, rows, row_valid)
        normed, dy = _load_normed(saved, mean, rstd, rows, columns, n_columns, row_valid)
        weighted = dy
        if saved.weight is not None:
            weighted = dy * weight[None, :]
        mean_product = tl.sum(weighted * normed, 1) / n_columns  # [BLOCK_M]
        mean_weighted = tl.zeros([BLOCK_M], tl.float32)
        if saved.mean is not None:
            mean_weighted = tl.sum(weighted, 1) / n_columns
        dx = _store_input_grads(
            sum_gradient(normed, weighted, mean_product, mean_weighted, rstd), saved, dz_ptr,
            dx_ptr, rows, 0, n_columns, row_valid, BLOCK_N,
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
def _norm_backward_long_rows(saved, dz_ptr, dx_ptr, n_rows, n_columns, BLOCK_N: tl.constexpr):
    """Write the input gradients of one row a program, in chunks."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # [1]
    row_valid = rows < n_rows
    mean, rstd = _load_statistics(saved, rows, row_valid)
    mean_product = tl.zeros([1], tl.float32)
    mean_weighted = tl.zeros([1], tl.float32)
    if saved.rstd is not None:
        for start in range(0, n_columns, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            normed, weighted = _load_weighted(
                saved, mean, rstd, rows, columns, n_columns, row_valid
            )  # [1, BLOCK_N]
            mean_product += tl.sum(weighted * normed, 1) / n_columns
            if saved.mean is not None:
                mean_weighted += tl.sum(weighted, 1) / n_columns
    for start in range(0, n_columns, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        normed, weighted = _load_weighted(saved, mean, rstd, rows, columns, n_columns, row_valid)
        _store_input_grads(
            sum_gradient(normed, weighted, mean_product, mean_weighted, rstd), saved, dz_ptr,
            dx_ptr, rows, start, n_columns, row_valid, BLOCK_N,
        )


@triton.jit(do_not_specialize=COUNTS)
def _norm_backward_long_columns(
    saved, dx_ptr, partials_ptr, n_rows, n_columns, n_partial, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    NEEDS_INPUT_BIAS: tl.constexpr,
):
    """Sum over rows for a block of columns; the input bias sums the dx written before."""
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dinput_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        row_valid = rows < n_rows
        if NEEDS_WEIGHT or NEEDS_BIAS:
            mean, rstd = _load_statistics(saved, rows, row_valid)
            normed, dy = _load_normed(saved, mean, rstd, rows, columns, n_columns, row_valid)
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
    """Compute (y, z, mean, rstd) over the last ``dims`` dimensions of ``x``.

    Results not wanted are None; so are y and rstd of kind "none", the mean unless the kind is
    "layer", and z without a residual. y and z are contiguous in the wider of the dtypes of ``x``
    and ``residual``, y in ``norm_dtype`` if it is given; mean and rstd are float32 ``[rows]``.
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
        config = configs.row_tile(
            "norm_forward", n_columns, configs.NORM_ONE_PASS, 2048, 16, configs.target_of(x.device)
        )
        x, x_stride = _rows_and_stride(x, n_columns)
        residual, residual_stride = _rows_and_stride(residual, n_columns)
        inputs = Inputs(
            x, residual, _flat(input_bias), _flat(weight), _flat(bias), seed, p, eps, x_stride,
            residual_stride,
        )
        launch(
            _norm_forward, (configs.ceil_div(n_rows, config.block_m),), config, inputs, y, z, mean,
            rstd, n_rows, n_columns,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, ONE_PASS=n_columns <= config.block_n,
            KIND=KINDS[kind],
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
    """Compute (dz, dx if dropout or its dtype makes it differ, dweight, dbias, dinput_bias).

    ``sum_grad`` is the gradient that reaches z itself. dz is contiguous in the dtype of ``z``, dx
    in ``input_dtype``; the gradients of parameters, None where not asked for, have the normalized
    shape and ``parameter_dtype``.
    """
    shape = z.shape[-dims:]
    n_columns = math.prod(shape)
    n_rows = math.prod(z.shape[:-dims])
    if dy is None or kind == "none":
        dy = mean = rstd = None
    elif kind == "rms":
        mean = None
    dz = contiguous_like(z)
    dx = None
    if seed is not None or input_dtype != z.dtype:
        dx = contiguous_like(z, input_dtype)
    wanted = [needs_weight, needs_bias, needs_input_bias]
    if z.numel() == 0:
        sums = [z.new_zeros(n_columns, dtype=parameter_dtype) for _ in range(sum(wanted))]
        return dz, dx, *_distribute(sums, wanted, shape)
    target = configs.target_of(z.device)
    longest = configs.NORM_BACKWARD_ONE_PASS
    if seed is not None:
        longest = configs.NORM_DROPOUT_BACKWARD_ONE_PASS
    config = configs.row_tile("norm_backward", n_columns, longest, 4096, 16, target)
    one_pass = n_columns <= config.block_n
    block_m = config.block_m if one_pass else 8
    programs = configs.row_programs(configs.ceil_div(n_rows, block_m), target)
    partials = z.new_empty((programs, sum(wanted) * n_columns), dtype=torch.float32)
    dy, dy_stride = _rows_and_stride(dy, n_columns)
    sum_grad, sum_grad_stride = _rows_and_stride(sum_grad, n_columns)
    z, z_stride = _rows_and_stride(z, n_columns)
    saved = Saved(
        dy, sum_grad, z, mean, rstd, _flat(weight), seed, p, dy_stride, sum_grad_stride, z_stride
    )
    names = "NEEDS_WEIGHT", "NEEDS_BIAS", "NEEDS_INPUT_BIAS"
    needs = dict(zip(names, wanted, strict=True))
    if one_pass:
        launch(
            _norm_backward, (programs,), config, saved, dz, dx, partials, n_rows, n_columns,
            partials.shape[1], BLOCK_M=block_m, BLOCK_N=config.block_n, **needs,
        )
    else:
        launch(
            _norm_backward_long_rows, (n_rows,), config, saved, dz, dx, n_rows, n_columns,
            BLOCK_N=config.block_n,
        )
        if any(wanted):
            block_n = 256
            grid = (programs, configs.ceil_div(n_columns, block_n))
            launch(
                _norm_backward_long_columns, grid, configs.LaunchConfig(4, 2), saved,
                dz if dx is None else dx, partials, n_rows, n_columns, partials.shape[1],
                BLOCK_M=block_m, BLOCK_N=block_n, **needs,
            )
    sums = sums_of_partials(partials, sum(wanted), parameter_dtype) if any(wanted) else []
    return dz, dx, *_distribute(sums, wanted, shape)


def _distribute(
    sums: list[torch.Tensor], wanted: list[bool], shape: torch.Size
) -> list[torch.Tensor | None]:
    rows = iter(sums)
    return [next(rows).view(shape) if want else None for want in wanted]


def _rows_and_stride(x: Any, n_columns: int) -> tuple[Any, int]:
    """(rows of contiguous columns, elements from one to the next); (None, 0) for None."""
    if x is None:
        return None, 0
    rows = rows_of(x, n_columns)
    return rows, rows.stride(0)


def _flat(parameter: torch.Tensor | None) -> torch.Tensor | None:
    if parameter is None or parameter.dim() == 1:
        return contiguous_vector(parameter)
    return contiguous_vector(parameter.reshape(-1))
