"""Compute LayerNorm and RMSNorm, alone or on ``dropout(x + input_bias) + residual``.

    z = dropout(x + input_bias) + residual
    layer:  y = (z - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
    rms:    y = z * rstd * weight,                   rstd = 1 / sqrt(mean(z**2) + eps)
    none:   only z

A program per BLOCK_M rows, kept in registers (a row of more than 16,384 columns is read twice in
chunks). It reads x and residual, and writes y, z and two floats a row. The backward is in
:mod:`norm_backward`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.rows.reduction import (
    mean_of_parts,
    no_tiles,
    row_mean,
    variance_of_parts,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    cast,
    dropout_keep,
    dropout_scale,
    fma,
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
    """Write the tile ``z`` [BLOCK_M, BLOCK_N]; return how much its rounding adds to it."""
    in_row = (columns < n_columns)[None, :]
    offsets = (rows * n_columns)[:, None] + columns[None, :]
    stored = cast(z, z_ptr.dtype.element_ty)
    tl.store(z_ptr + offsets, stored, mask=row_valid[:, None] & in_row)
    return tl.where(in_row, stored.to(tl.float32) - z, 0.0)


@triton.jit
def _load_parameter(ptr, columns, n_columns):
    """Load a weight or bias, whose columns are given for each element of a tile."""
    if ptr is None:
        return tl.zeros(columns.shape, tl.float32)
    else:
        return tl.load(ptr + columns, mask=columns < n_columns, other=0.0)


@triton.jit
def load_affine(
    weight_ptr, bias_ptr, first_column, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Load (weight, bias) of columns as tiles [BLOCK_M, BLOCK_N].

    All rows are equal, but so each thread loads what it needs, and none waits for another.
    """
    columns = first_column + tl.zeros([BLOCK_M, 1], tl.int32) + tl.arange(0, BLOCK_N)[None, :]
    weight = _load_parameter(weight_ptr, columns, n_columns)
    return weight, _load_parameter(bias_ptr, columns, n_columns)


@triton.jit
def affine(normed, parameters, weight_ptr, bias_ptr):
    """Compute ``normed * weight + bias`` of tiles [BLOCK_M, BLOCK_N], without those that are None.

    ``parameters`` are the tiles that :func:`load_affine` loaded from the two.
    """
    y = normed
    if weight_ptr is not None:
        if bias_ptr is not None:
            y = fma(y, parameters[0].to(tl.float32), parameters[1].to(tl.float32))
        else:
            y *= parameters[0].to(tl.float32)
    elif bias_ptr is not None:
        y += parameters[1].to(tl.float32)
    return y


@triton.jit
def _store_normed(y_ptr, z, mean, rstd, parameters, inputs, rows, columns, n_columns, row_valid):
    """Write the norm of the tile ``z`` [BLOCK_M, BLOCK_N] from statistics [BLOCK_M]."""
    normed = (z - mean[:, None]) * rstd[:, None]
    y = affine(normed, parameters, inputs.weight, inputs.bias)
    offsets = (rows * n_columns)[:, None] + columns[None, :]
    store(y_ptr + offsets, y, row_valid[:, None] & (columns < n_columns)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def _norm_forward(
    inputs, y_ptr, z_ptr, mean_ptr, rstd_ptr, n_rows, n_columns, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, ONE_PASS: tl.constexpr, KIND: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_valid = rows < n_rows
    mean = tl.zeros([BLOCK_M], tl.float32)
    roundings = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ONE_PASS:
        parts, parameters = no_tiles(), no_tiles()
        for part in tl.static_range(PARTS):
            z = _load_sum(
                inputs, rows, part * BLOCK_N, n_columns, row_valid, BLOCK_N
            )  # [BLOCK_M, BLOCK_N]
            if z_ptr is not None:
                columns = part * BLOCK_N + tl.arange(0, BLOCK_N)
                roundings += _store_sum(z_ptr, z, rows, columns, n_columns, row_valid)
            parts += (z,)
            parameters += (
                load_affine(
                    inputs.weight, inputs.bias, part * BLOCK_N, n_columns, BLOCK_M, BLOCK_N
                ),
            )
        if KIND != _NONE:
            if KIND == _LAYER:
                mean = mean_of_parts(parts, n_columns)
            rstd = 1.0 / tl.sqrt(variance_of_parts(parts, mean, n_columns) + inputs.eps)
            for part in tl.static_range(PARTS):
                columns = part * BLOCK_N + tl.arange(0, BLOCK_N)
                _store_normed(
                    y_ptr, parts[part], mean, rstd, parameters[part], inputs, rows, columns,
                    n_columns, row_valid,
                )
    else:
        squares = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, n_columns, BLOCK_N):
            z = _load_sum(inputs, rows, start, n_columns, row_valid, BLOCK_N)  # [BLOCK_M, BLOCK_N]
            columns = start + tl.arange(0, BLOCK_N)
            in_row = (columns < n_columns)[None, :]
            if z_ptr is not None:
                roundings += _store_sum(z_ptr, z, rows, columns, n_columns, row_valid)
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
                parameters = load_affine(
                    inputs.weight, inputs.bias, start, n_columns, BLOCK_M, BLOCK_N
                )
                _store_normed(
                    y_ptr, z, mean, rstd, parameters, inputs, rows, columns, n_columns, row_valid
                )
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=row_valid)
        if KIND == _LAYER:  # the mean of z as the backward will read it
            if z_ptr is not None:
                mean += tl.sum(roundings, 1) / n_columns
            tl.store(mean_ptr + rows, mean, mask=row_valid)


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
        target = targets.target_of(x.device)
        config = configs.parts_tile("norm_forward", n_columns, configs.NORM_ONE_PASS, target)
        x, x_stride = rows_and_stride(x, n_columns)
        residual, residual_stride = rows_and_stride(residual, n_columns)
        inputs = Inputs(
            x, residual, flat(input_bias, n_columns), flat(weight, n_columns),
            flat(bias, n_columns), seed, p, eps, x_stride, residual_stride,
        )
        launch(
            _norm_forward, (targets.ceil_div(n_rows, config.block_m),), config, inputs, y, z, mean,
            rstd, n_rows, n_columns,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, PARTS=config.parts,
            ONE_PASS=n_columns <= configs.NORM_ONE_PASS, KIND=KINDS[kind],
        )
    return y, z, mean, rstd


def rows_and_stride(x: Any, n_columns: int) -> tuple[Any, int]:
    """(rows of contiguous columns, elements from one to the next); (None, 0) for None."""
    if x is None:
        return None, 0
    rows = rows_of(x, n_columns)
    return rows, rows.stride(0)


def flat(parameter: torch.Tensor | None, n_columns: int) -> torch.Tensor | None:
    if parameter is None or parameter.dim() == 1:
        return contiguous_vector(parameter, n_columns)
    return contiguous_vector(parameter.reshape(-1), n_columns)
