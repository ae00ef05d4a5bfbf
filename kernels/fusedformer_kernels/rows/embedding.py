"""Add token, position and type embeddings, and apply norm and dropout; forward and backward.

    z = token[id] + position[position_id] + type[type_id]
    y = dropout((z - mean) * rstd * weight + bias),   rstd = 1 / sqrt(var + eps)

Forward: a program per BLOCK_M rows, which it gathers from the tables and keeps in float32
registers. It reads each row's vectors (types and positions mostly from the cache), writes y, and
two floats a row; z is never in memory.
Backward: persistent programs gather z again and write its gradient, which is that of each table's
row; the tables' own sums over equal ids are ATen's. Sums for weight and bias are kept in registers,
each program leaves one partial row of them, which :mod:`reduction` adds up in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows.norm import affine, sum_gradient
from fusedformer_kernels.rows.reduction import row_mean, store_partials, sums_of_partials
from fusedformer_kernels.runtime import configs
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import COUNTS, dropout_keep, dropout_scale, fma, store
from fusedformer_kernels.runtime.strided import rows_of

LONGEST = configs.NORM_BACKWARD_ONE_PASS  # columns that one program keeps in registers


class Tables(NamedTuple):
    """The tables that are added up, ``[n, E]``, and the integer ids of each row, ``[rows]``.

    All rows are of type 0 where types have no ids.
    """

    ids: torch.Tensor
    tokens: torch.Tensor
    position_ids: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    type_ids: torch.Tensor | None = None
    types: torch.Tensor | None = None


class TableSizes(NamedTuple):
    """How many rows each table has. Kernels get each by itself: see ``primitives.COUNTS``."""

    tokens: Any
    positions: Any
    types: Any


class TableStrides(NamedTuple):
    """Elements from a row of each table to the next."""

    tokens: Any
    positions: Any
    types: Any


@triton.jit
def _load_vectors(table, ids_ptr, n_table, stride, rows, columns, row_valid, in_row):
    """Load rows of a table as float32 [BLOCK_M, BLOCK_N]; NaN where an id has none, 0 outside."""
    ids = tl.zeros_like(rows)
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + rows, mask=row_valid, other=0).to(tl.int64)
    there = (ids >= 0) & (ids < n_table)
    valid = (row_valid & there)[:, None] & in_row[None, :]
    vectors = tl.load(
        table + (ids * stride)[:, None] + columns[None, :], mask=valid, other=0.0
    ).to(tl.float32)
    wrong = (row_valid & (ids < 0)) | (row_valid & (ids >= n_table))
    return tl.where(wrong[:, None] & in_row[None, :], float("nan"), vectors)


@triton.jit
def _load_embedded(tables, sizes, strides, rows, columns, row_valid, in_row):
    """Load the float32 sum of the tables' rows [BLOCK_M, BLOCK_N], 0 outside."""
    z = _load_vectors(
        tables.tokens, tables.ids, sizes.tokens, strides.tokens, rows, columns, row_valid, in_row
    )
    if tables.positions is not None:
        z += _load_vectors(
            tables.positions, tables.position_ids, sizes.positions, strides.positions, rows,
            columns, row_valid, in_row,
        )
    if tables.types is not None:
        z += _load_vectors(
            tables.types, tables.type_ids, sizes.types, strides.types, rows, columns, row_valid,
            in_row,
        )
    return z


@triton.jit(do_not_specialize=COUNTS)
def _embedding_forward(
    tables, n_tokens, n_positions, n_types, strides, weight_ptr, bias_ptr, seed_ptr, y_ptr,
    mean_ptr, rstd_ptr, p, eps, n_rows, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    sizes = TableSizes(n_tokens, n_positions, n_types)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_valid = rows < n_rows
    in_row = columns < n_columns
    z = _load_embedded(
        tables, sizes, strides, rows, columns, row_valid, in_row
    )  # [BLOCK_M, BLOCK_N]
    mean = row_mean(z, in_row[None, :], n_columns)
    centered = tl.where(in_row[None, :], z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / n_columns + eps)
    y = affine(centered * rstd[:, None], weight_ptr, bias_ptr, columns, in_row)
    if seed_ptr is not None:
        keep = dropout_keep(tl.load(seed_ptr), 0, rows, 0, p, BLOCK_N)
        y = tl.where(keep, y * dropout_scale(p), 0.0)
    offsets = (rows * n_columns)[:, None] + columns[None, :]
    store(y_ptr + offsets, y, row_valid[:, None] & in_row[None, :])
    tl.store(mean_ptr + rows, mean, mask=row_valid)
    tl.store(rstd_ptr + rows, rstd, mask=row_valid)


@triton.jit(do_not_specialize=COUNTS)
def _embedding_backward(
    dy_ptr, tables, n_tokens, n_positions, n_types, strides, mean_ptr, rstd_ptr, weight_ptr,
    seed_ptr, dz_ptr, partials_ptr, p, n_rows, n_columns, stride_dy, n_partial,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr,
):
    sizes = TableSizes(n_tokens, n_positions, n_types)
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        row_valid = rows < n_rows
        offsets = (rows * stride_dy)[:, None] + columns[None, :]
        valid = row_valid[:, None] & in_row[None, :]
        dy = tl.load(dy_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), 0, rows, 0, p, BLOCK_N)
            dy = tl.where(keep, dy * dropout_scale(p), 0.0)
        if dz_ptr is not None or NEEDS_WEIGHT:
            z = _load_embedded(
                tables, sizes, strides, rows, columns, row_valid, in_row
            )  # [BLOCK_M, BLOCK_N]
            mean = tl.load(mean_ptr + rows, mask=row_valid, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=row_valid, other=0.0)
            normed = tl.where(valid, (z - mean[:, None]) * rstd[:, None], 0.0)
        if dz_ptr is not None:
            weighted = dy
            if weight_ptr is not None:
                weighted = dy * weight[None, :]
            mean_product = tl.sum(weighted * normed, 1) / n_columns  # [BLOCK_M]
            mean_weighted = tl.sum(weighted, 1) / n_columns
            dz = sum_gradient(normed, weighted, mean_product, mean_weighted, rstd)
            store(dz_ptr + (rows * n_columns)[:, None] + columns[None, :], dz, valid)
        if NEEDS_WEIGHT:
            dweight = fma(dy, normed, dweight)
        if NEEDS_BIAS:
            dbias += dy
    store_partials(
        partials_ptr + tl.program_id(0) * n_partial, columns, n_columns, dweight, dbias, dbias,
        NEEDS_WEIGHT, NEEDS_BIAS, False,
    )


@planned
def embedding_forward(
    tables: Tables,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute (y ``[rows, E]`` in ``dtype`` or the tables', mean, rstd, float32 ``[rows]``)."""
    tokens = tables.tokens
    n_rows, n_columns = tables.ids.numel(), tokens.shape[1]
    y = tokens.new_empty(n_rows, n_columns, dtype=dtype)
    mean = torch.empty(n_rows, dtype=torch.float32, device=tokens.device)
    rstd = torch.empty_like(mean)
    if y.numel():
        config = _config(n_columns, tokens.device)
        launch(
            _embedding_forward, (configs.ceil_div(n_rows, config.block_m),), config,
            *_arguments(tables), weight, bias, seed, y, mean, rstd, p, eps, n_rows, n_columns,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        )
    return y, mean, rstd


@planned
def embedding_backward(
    dy: torch.Tensor,
    tables: Tables,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    needs_tables: bool,
    needs_weight: bool,
    needs_bias: bool,
    parameter_dtype: torch.dtype,
) -> tuple[torch.Tensor | None, ...]:
    """Compute (dz ``[rows, E]`` in the tables' dtype, dweight, dbias), None if not needed."""
    tokens = tables.tokens
    n_rows, n_columns = tables.ids.numel(), tokens.shape[1]
    device = tokens.device
    dz = tokens.new_empty(n_rows, n_columns) if needs_tables else None
    wanted = needs_weight, needs_bias
    if not n_rows * n_columns:
        sums = [tokens.new_zeros(n_columns, dtype=parameter_dtype) for _ in range(sum(wanted))]
    else:
        target = configs.target_of(device)
        config = _config(n_columns, device)
        programs = configs.row_programs(configs.ceil_div(n_rows, config.block_m), target)
        shape = programs, sum(wanted) * n_columns
        partials = torch.empty(shape, dtype=torch.float32, device=device)
        dy_rows = rows_of(dy, n_columns)
        launch(
            _embedding_backward, (programs,), config,
            dy_rows, *_arguments(tables), mean, rstd, weight, seed, dz, partials, p, n_rows,
            n_columns, dy_rows.stride(0), partials.shape[1],
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, NEEDS_WEIGHT=needs_weight,
            NEEDS_BIAS=needs_bias,
        )
        sums = sums_of_partials(partials, sum(wanted), parameter_dtype) if any(wanted) else []
    rows = iter(sums)
    dweight, dbias = (next(rows) if want else None for want in wanted)
    return dz, dweight, dbias


def _config(n_columns: int, device: torch.device) -> configs.TileConfig:
    return configs.row_tile(
        "embedding", n_columns, LONGEST, 2048, 16, configs.target_of(device)
    )


def _arguments(tables: Tables) -> tuple[Tables | TableStrides | int, ...]:
    given = tables.tokens, tables.positions, tables.types
    sizes = (0 if table is None else table.shape[0] for table in given)
    strides = (0 if table is None else table.stride(0) for table in given)
    return tables, *sizes, TableStrides(*strides)
