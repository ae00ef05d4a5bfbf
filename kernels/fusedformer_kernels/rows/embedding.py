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

from fusedformer_kernels.rows import configs
from fusedformer_kernels.rows.norm import affine, load_affine
from fusedformer_kernels.rows.norm_backward import load_weights, sum_gradient
from fusedformer_kernels.rows.reduction import (
    add_to_sums,
    mean_of_parts,
    no_tiles,
    store_partials,
    sums_of_partials,
    variance_of_parts,
    zero_sums,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    dropout_keep,
    dropout_scale,
    fma,
    let_next_begin,
    store,
)
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


class TableStrides(NamedTuple):
    """Elements from a row of each table to the next."""

    tokens: Any
    positions: Any
    types: Any


class TableIds(NamedTuple):
    """The ids of a tile's rows, int64 [BLOCK_M], 0 where a table has none."""

    tokens: Any
    positions: Any
    types: Any


@triton.jit
def _load_ids(tables, n_tokens, n_positions, n_types, rows, row_valid):
    """Load what id of each table rows [BLOCK_M] have, and find those that a table does not have."""
    ids = tl.load(tables.ids + rows, mask=row_valid, other=0).to(tl.int64)
    wrong = (ids < 0) | (ids >= n_tokens)
    position_ids = tl.zeros_like(rows)
    if tables.positions is not None:
        position_ids = tl.load(tables.position_ids + rows, mask=row_valid, other=0).to(tl.int64)
        wrong |= (position_ids < 0) | (position_ids >= n_positions)
    type_ids = tl.zeros_like(rows)
    if tables.type_ids is not None:
        type_ids = tl.load(tables.type_ids + rows, mask=row_valid, other=0).to(tl.int64)
        wrong |= (type_ids < 0) | (type_ids >= n_types)
    return TableIds(ids, position_ids, type_ids), wrong


@triton.jit
def _load_vectors(table, ids, stride, columns, valid):
    """Load rows of a table as float32 [BLOCK_M, BLOCK_N], 0 where not valid."""
    offsets = (ids * stride)[:, None] + columns[None, :]
    return tl.load(table + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _load_embedded(tables, ids, strides, columns, valid):
    """Load the float32 sum of the tables' rows [BLOCK_M, BLOCK_N], 0 where not valid."""
    z = _load_vectors(tables.tokens, ids.tokens, strides.tokens, columns, valid)
    if tables.positions is not None:
        z += _load_vectors(tables.positions, ids.positions, strides.positions, columns, valid)
    if tables.types is not None:
        z += _load_vectors(tables.types, ids.types, strides.types, columns, valid)
    return z


@triton.jit(do_not_specialize=COUNTS)
def _embedding_forward(
    tables, n_tokens, n_positions, n_types, strides, weight_ptr, bias_ptr, seed_ptr, y_ptr,
    mean_ptr, rstd_ptr, p, eps, n_rows, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_valid = rows < n_rows
    ids, wrong = _load_ids(tables, n_tokens, n_positions, n_types, rows, row_valid)
    parts, parameters = no_tiles(), no_tiles()
    for part in tl.static_range(PARTS):
        columns = part * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        parameters += (
            load_affine(weight_ptr, bias_ptr, part * BLOCK_N, n_columns, BLOCK_M, BLOCK_N),
        )
        valid = (row_valid & ~wrong)[:, None] & (columns < n_columns)[None, :]
        parts += (_load_embedded(tables, ids, strides, columns, valid),)
    mean = tl.where(wrong, float("nan"), mean_of_parts(parts, n_columns))
    rstd = 1.0 / tl.sqrt(variance_of_parts(parts, mean, n_columns) + eps)
    for part in tl.static_range(PARTS):
        columns = part * BLOCK_N + tl.arange(0, BLOCK_N)
        normed = (parts[part] - mean[:, None]) * rstd[:, None]
        y = affine(normed, parameters[part], weight_ptr, bias_ptr)
        if seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), 0, rows, part * BLOCK_N, p, BLOCK_N)
            y = tl.where(keep, y * dropout_scale(p), 0.0)
        offsets = (rows * n_columns)[:, None] + columns[None, :]
        store(y_ptr + offsets, y, row_valid[:, None] & (columns < n_columns)[None, :])
    tl.store(mean_ptr + rows, mean, mask=row_valid)
    tl.store(rstd_ptr + rows, rstd, mask=row_valid)


@triton.jit(do_not_specialize=COUNTS)
def _embedding_backward(
    dy_ptr, tables, n_tokens, n_positions, n_types, strides, mean_ptr, rstd_ptr, weight_ptr,
    seed_ptr, dz_ptr, partials_ptr, p, n_rows, n_columns, stride_dy, n_partial,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr, OVERLAPS: tl.constexpr,
):
    let_next_begin(OVERLAPS)
    weights = load_weights(weight_ptr, n_columns, BLOCK_N, PARTS)
    sums = zero_sums(PARTS, BLOCK_M, BLOCK_N)
    for block in tl.range(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES
    ):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        row_valid = rows < n_rows
        mean = tl.load(mean_ptr + rows, mask=row_valid, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_valid, other=0.0)
        # The forward made the mean of a row with a wrong id NaN, and so is its gradient.
        ids, wrong = _load_ids(tables, n_tokens, n_positions, n_types, rows, row_valid)
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        totals = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        parts, new_sums = no_tiles(), no_tiles()
        for part in tl.static_range(PARTS):
            columns = part * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            valid = row_valid[:, None] & (columns < n_columns)[None, :]
            offsets = (rows * stride_dy)[:, None] + columns[None, :]
            dy = tl.load(dy_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
            if seed_ptr is not None:
                keep = dropout_keep(tl.load(seed_ptr), 0, rows, part * BLOCK_N, p, BLOCK_N)
                dy = tl.where(keep, dy * dropout_scale(p), 0.0)
            normed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if dz_ptr is not None or NEEDS_WEIGHT:
                z = _load_embedded(tables, ids, strides, columns, valid & ~wrong[:, None])
                normed = (z - mean[:, None]) * rstd[:, None]
            weighted = dy
            if weight_ptr is not None:
                weighted = dy * weights[part][None, :]
            products = fma(weighted, normed, products)
            totals += weighted
            parts += ((normed, weighted),)
            new_sums += (add_to_sums(sums[part], dy, normed, NEEDS_WEIGHT, NEEDS_BIAS),)
        sums = new_sums
        if dz_ptr is not None:
            mean_product = tl.sum(products, 1) / n_columns  # [BLOCK_M]
            mean_weighted = tl.sum(totals, 1) / n_columns
            for part in tl.static_range(PARTS):
                columns = part * BLOCK_N + tl.arange(0, BLOCK_N)
                valid = row_valid[:, None] & (columns < n_columns)[None, :]
                dz = sum_gradient(parts[part], mean_product, mean_weighted, rstd)
                store(dz_ptr + (rows * n_columns)[:, None] + columns[None, :], dz, valid)
    store_partials(
        partials_ptr + tl.program_id(0) * n_partial, sums, 0, n_columns, BLOCK_N, PARTS,
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
        config = configs.parts_tile(
            "embedding_forward", n_columns, LONGEST, targets.target_of(tokens.device)
        )
        launch(
            _embedding_forward, (targets.ceil_div(n_rows, config.block_m),), config,
            *_arguments(tables), weight, bias, seed, y, mean, rstd, p, eps, n_rows, n_columns,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, PARTS=config.parts,
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
        target = targets.target_of(device)
        loaded = dy.element_size() + 3 * tokens.element_size()
        config = configs.persistent_tile(
            "embedding_backward", n_columns, LONGEST, False, loaded, target
        )
        blocks = targets.ceil_div(n_rows, config.block_m)
        programs = configs.row_programs(blocks, target, config.programs)
        shape = programs, sum(wanted) * n_columns
        partials = torch.empty(shape, dtype=torch.float32, device=device)
        dy_rows = rows_of(dy, n_columns)
        overlaps = target.overlaps and any(wanted)
        launch(
            _embedding_backward, (programs,), config,
            dy_rows, *_arguments(tables), mean, rstd, weight, seed, dz, partials, p, n_rows,
            n_columns, dy_rows.stride(0), partials.shape[1],
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, PARTS=config.parts,
            STAGES=config.num_stages, NEEDS_WEIGHT=needs_weight, NEEDS_BIAS=needs_bias,
            OVERLAPS=overlaps,
        )
        sums = []
        if any(wanted):
            sums = sums_of_partials(partials, sum(wanted), parameter_dtype, overlaps)
    rows = iter(sums)
    dweight, dbias = (next(rows) if want else None for want in wanted)
    return dz, dweight, dbias


def _arguments(tables: Tables) -> tuple[Tables | TableStrides | int, ...]:
    given = tables.tokens, tables.positions, tables.types
    sizes = (0 if table is None else table.shape[0] for table in given)
    strides = (0 if table is None else table.stride(0) for table in given)
    return tables, *sizes, TableStrides(*strides)
