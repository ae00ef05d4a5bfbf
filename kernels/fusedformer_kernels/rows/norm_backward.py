"""Compute the backward of LayerNorm and RMSNorm, and of the sum before them: see :mod:`norm`.

Persistent programs walk the rows; while one tile is worked on, the next is on its way to shared
memory. A row lies in PARTS tiles of BLOCK_N columns, so that a thread has the same few columns of
each row: 768 columns are three tiles of 256, and a row is one warp's. The sums for weight, bias and
input bias stay in registers, and each program leaves one partial row of them, which
:mod:`reduction` adds up in a fixed order. Rows of more than 8,192 columns take two kernels, one by
rows and one by columns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.rows.norm import flat, rows_and_stride
from fusedformer_kernels.rows.reduction import (
    add_to_sums,
    no_tiles,
    store_partials,
    sums_of_partials,
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
    negative,
    store,
)
from fusedformer_kernels.runtime.strided import contiguous_like


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
    """Load float32 (normalized z, its gradient) of a tile [BLOCK_M, BLOCK_N].

    Both are 0 in rows that there are not, the gradient in columns too.
    """
    valid = row_valid[:, None] & (columns < n_columns)[None, :]
    normed = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    dy = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    if saved.grad is not None:
        offsets = (rows * saved.z_stride)[:, None] + columns[None, :]
        z = tl.load(saved.z + offsets, mask=valid, other=0.0)
        normed = (z.to(tl.float32) - mean[:, None]) * rstd[:, None]
        offsets = (rows * saved.grad_stride)[:, None] + columns[None, :]
        dy = tl.load(saved.grad + offsets, mask=valid, other=0.0).to(tl.float32)
    return normed, dy


@triton.jit
def _load_weight(weight_ptr, columns, n_columns):
    """Load the float32 weight of columns [BLOCK_N], 1 where there is none."""
    weight = tl.full(columns.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < n_columns, other=0.0)
    return weight.to(tl.float32)


@triton.jit
def load_weights(weight_ptr, n_columns, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Load the float32 weight [BLOCK_N] of each part of a row."""
    weights = no_tiles()
    for part in tl.static_range(PARTS):
        columns = part * BLOCK_N + tl.arange(0, BLOCK_N)
        weights += (_load_weight(weight_ptr, columns, n_columns),)
    return weights


@triton.jit
def _load_weighted(saved, mean, rstd, rows, columns, n_columns, row_valid):
    """Load float32 (normalized z, its gradient times the weight), as :func:`_load_normed`."""
    normed, weighted = _load_normed(saved, mean, rstd, rows, columns, n_columns, row_valid)
    if saved.weight is not None:
        weighted *= _load_weight(saved.weight, columns, n_columns)[None, :]
    return normed, weighted


@triton.jit
def sum_gradient(tiles, mean_product, mean_weighted, rstd):
    """Compute the gradient of z [BLOCK_M, BLOCK_N]; means [BLOCK_M] are those of whole rows.

    ``tiles`` are normalized z, and the gradient of the norm times the weight; ``mean_product`` is
    the mean of their product, and ``mean_weighted`` is 0 where no mean was subtracted.
    """
    normed, weighted = tiles
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
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, NEEDS_INPUT_BIAS: tl.constexpr, OVERLAPS: tl.constexpr,
):
    let_next_begin(OVERLAPS)
    weights = load_weights(saved.weight, n_columns, BLOCK_N, PARTS)
    sums = zero_sums(PARTS, BLOCK_M, BLOCK_N)
    for block in tl.range(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES
    ):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        row_valid = rows < n_rows
        mean, rstd = _load_statistics(saved, rows, row_valid)
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        totals = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        parts, new_sums = no_tiles(), no_tiles()
        for part in tl.static_range(PARTS):
            columns = part * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            normed, dy = _load_normed(saved, mean, rstd, rows, columns, n_columns, row_valid)
            weighted = dy
            if saved.weight is not None:
                weighted = dy * weights[part][None, :]
            products = fma(weighted, normed, products)
            totals += weighted
            parts += ((normed, weighted),)
            new_sums += (add_to_sums(sums[part], dy, normed, NEEDS_WEIGHT, NEEDS_BIAS),)
        mean_product = tl.sum(products, 1) / n_columns  # [BLOCK_M]
        mean_weighted = tl.zeros([BLOCK_M], tl.float32)
        if saved.mean is not None:
            mean_weighted = tl.sum(totals, 1) / n_columns
        sums = no_tiles()
        for part in tl.static_range(PARTS):
            dweight, dbias, dinput_bias = new_sums[part]
            dx = _store_input_grads(
                sum_gradient(parts[part], mean_product, mean_weighted, rstd), saved, dz_ptr,
                dx_ptr, rows, part * BLOCK_N, n_columns, row_valid, BLOCK_N,
            )
            if NEEDS_INPUT_BIAS:
                dinput_bias += dx
            sums += ((dweight, dbias, dinput_bias),)
    store_partials(
        partials_ptr + tl.program_id(0) * n_partial, sums, 0, n_columns, BLOCK_N, PARTS,
        NEEDS_WEIGHT, NEEDS_BIAS, NEEDS_INPUT_BIAS,
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
            sum_gradient((normed, weighted), mean_product, mean_weighted, rstd), saved, dz_ptr,
            dx_ptr, rows, start, n_columns, row_valid, BLOCK_N,
        )


@triton.jit(do_not_specialize=COUNTS)
def _norm_backward_long_columns(
    saved, dx_ptr, partials_ptr, n_rows, n_columns, n_partial, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    NEEDS_INPUT_BIAS: tl.constexpr, OVERLAPS: tl.constexpr,
):
    """Sum over rows for a block of columns; the input bias sums the dx written before."""
    let_next_begin(OVERLAPS)
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
        partials_ptr + tl.program_id(0) * n_partial, ((dweight, dbias, dinput_bias),),
        tl.program_id(1) * BLOCK_N, n_columns, BLOCK_N, 1, NEEDS_WEIGHT, NEEDS_BIAS,
        NEEDS_INPUT_BIAS,
    )


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
    target = targets.target_of(z.device)
    longest = configs.NORM_BACKWARD_ONE_PASS
    if seed is not None:
        longest = configs.NORM_DROPOUT_BACKWARD_ONE_PASS
    loaded = sum(t.element_size() for t in (dy, sum_grad, z) if t is not None)
    config = configs.persistent_tile(
        "norm_backward", n_columns, longest, needs_input_bias, loaded, target
    )
    one_pass = n_columns <= longest
    block_m = config.block_m if one_pass else 8
    programs = configs.row_programs(
        targets.ceil_div(n_rows, block_m), target, config.programs
    )
    partials = z.new_empty((programs, sum(wanted) * n_columns), dtype=torch.float32)
    dy, dy_stride = rows_and_stride(dy, n_columns)
    sum_grad, sum_grad_stride = rows_and_stride(sum_grad, n_columns)
    z, z_stride = rows_and_stride(z, n_columns)
    saved = Saved(
        dy, sum_grad, z, mean, rstd, flat(weight, n_columns), seed, p, dy_stride, sum_grad_stride,
        z_stride,
    )
    names = "NEEDS_WEIGHT", "NEEDS_BIAS", "NEEDS_INPUT_BIAS"
    needs = dict(zip(names, wanted, strict=True))
    overlaps = target.overlaps and any(wanted)
    if one_pass:
        launch(
            _norm_backward, (programs,), config, saved, dz, dx, partials, n_rows, n_columns,
            partials.shape[1], BLOCK_M=block_m, BLOCK_N=config.block_n,
            PARTS=config.parts, STAGES=config.num_stages, **needs, OVERLAPS=overlaps,
        )
    else:
        launch(
            _norm_backward_long_rows, (n_rows,), config, saved, dz, dx, n_rows, n_columns,
            BLOCK_N=config.block_n,
        )
        if any(wanted):
            block_n = 256
            grid = (programs, targets.ceil_div(n_columns, block_n))
            launch(
                _norm_backward_long_columns, grid, targets.LaunchConfig(4, 2), saved,
                dz if dx is None else dx, partials, n_rows, n_columns, partials.shape[1],
                BLOCK_M=block_m, BLOCK_N=block_n, **needs, OVERLAPS=overlaps,
            )
    sums = []
    if any(wanted):
        sums = sums_of_partials(partials, sum(wanted), parameter_dtype, overlaps)
    return dz, dx, *_distribute(sums, wanted, shape)


def _distribute(
    sums: list[torch.Tensor], wanted: list[bool], shape: torch.Size
) -> list[torch.Tensor | None]:
    rows = iter(sums)
    return [next(rows).view(shape) if want else None for want in wanted]


