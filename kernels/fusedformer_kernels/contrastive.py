"""Scores of all pairs of two batches, reduced tile by tile: contrastive losses and gradients.

    s = scale * a @ b.T                            a: [M, D], b: [N, D]; row i and column i + offset
    row_i = logsumexp_j s_ij,  column_j = logsumexp_i s_ij,  matched_i = s_i,i+offset
    ds_ij = grow_i * exp(s_ij - row_i) + gcolumn_j * exp(s_ij - column_j) + gmatched_i * [matched]

and of the sigmoid form, z = 1 where matched and -1 elsewhere:

    s = scale * a @ b.T + bias,  loss_i = sum_j softplus(-z_ij * s_ij)
    ds_ij = -g_i * z_ij * sigmoid(-z_ij * s_ij)

A program computes a tile of BLOCK_M x BLOCK_N scores by a loop over D, and reduces it in registers.
Forward: to the base-2 log-sum-exp of the part of each row and each column that is in the tile (or
the sum of each row's softplus); ``_merge_parts`` then merges the parts in their order. Rows go in
strips of FORWARD_ROWS, so that there are at most FORWARD_ROWS / BLOCK_M parts of a column: parts
take FORWARD_ROWS * N / BLOCK_N + FORWARD_ROWS * N / BLOCK_M floats, which is linear in N.
Backward: scores are computed again, and a strip of BACKWARD_ROWS rows of ds / scale is written in
the dtype of the inputs, for the products ds @ b and ds.T @ a, which are torch's. Scores are only
ever in registers, in float32.

Bytes: every tile reads BLOCK_M rows of a and BLOCK_N rows of b, from the L2 cache but for the
first; the forward writes parts alone, the backward M * N elements of ds, strip by strip. FLOPs:
2 * M * N * D each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels import configs
from fusedformer_kernels.launch import launch
from fusedformer_kernels.primitives import LN_2, LOG2_E, dot, softplus, store
from fusedformer_kernels.reduction import sum_partials

FORWARD_ROWS = 8192
BACKWARD_ROWS = 4096


@triton.jit
def _tile_place(n_rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first row, first column) of this program's tile; row blocks come first, so that programs
    that run together read few rows of b."""
    blocks = tl.cdiv(n_rows, BLOCK_M)
    return tl.program_id(0) % blocks * BLOCK_M, tl.program_id(0) // blocks * BLOCK_N


@triton.jit
def _products(
    a_ptr, b_ptr, first_row, first_column, n_rows, n_columns, n_dims, stride_a, stride_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 ``a @ b.T`` of a tile [BLOCK_M, BLOCK_N]; beyond the last row or column that one
    again, so that the loop, over a multiple of BLOCK_K, needs no mask."""
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), n_rows - 1).to(tl.int64)
    columns = tl.minimum(first_column + tl.arange(0, BLOCK_N), n_columns - 1).to(tl.int64)
    dims = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + (rows * stride_a)[:, None] + dims[None, :]  # [BLOCK_M, BLOCK_K]
    b_tile = b_ptr + (columns * stride_b)[None, :] + dims[:, None]  # [BLOCK_K, BLOCK_N]
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, n_dims, BLOCK_K):
        products = dot(tl.load(a_tile), tl.load(b_tile), products, PRECISION)
        a_tile += BLOCK_K
        b_tile += BLOCK_K
    return products


@triton.jit
def _matched(first_row, first_column, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which pairs of a tile are matched [BLOCK_M, BLOCK_N]."""
    rows = first_row + offset + tl.arange(0, BLOCK_M)
    return rows[:, None] == (first_column + tl.arange(0, BLOCK_N))[None, :]


@triton.jit
def _has_matched(first_row, first_column, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether any pair of a tile may be."""
    start = first_row + offset
    return (start < first_column + BLOCK_N) & (start + BLOCK_M > first_column)


@triton.jit
def _score_parts(
    a_ptr, b_ptr, scale_ptr, row_parts_ptr, column_parts_ptr, matched_ptr, n_rows, n_columns,
    n_dims, offset, stride_a, stride_b, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    first_row, first_column = _tile_place(n_rows, BLOCK_M, BLOCK_N)
    products = _products(
        a_ptr, b_ptr, first_row, first_column, n_rows, n_columns, n_dims, stride_a, stride_b,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )
    s = products * (tl.load(scale_ptr) * LOG2_E)  # [BLOCK_M, BLOCK_N]
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    row_valid, column_valid = rows < n_rows, columns < n_columns
    if (first_row + BLOCK_M > n_rows) | (first_column + BLOCK_N > n_columns):
        s = tl.where(row_valid[:, None] & column_valid[None, :], s, float("-inf"))
    if _has_matched(first_row, first_column, offset, BLOCK_M, BLOCK_N):
        matched = _matched(first_row, first_column, offset, BLOCK_M, BLOCK_N)
        here = (rows + offset >= first_column) & (rows + offset < first_column + BLOCK_N)
        found = tl.sum(tl.where(matched, s, 0.0), 1) * LN_2
        tl.store(matched_ptr + rows, found, mask=row_valid & here)
    top = tl.where(row_valid, tl.max(s, 1), 0.0)
    total = tl.where(row_valid, tl.sum(tl.exp2(s - top[:, None]), 1), 1.0)
    row_parts = row_parts_ptr + (first_column // BLOCK_N).to(tl.int64) * n_rows
    tl.store(row_parts + rows, top + tl.log2(total), mask=row_valid)
    top = tl.where(column_valid, tl.max(s, 0), 0.0)
    total = tl.where(column_valid, tl.sum(tl.exp2(s - top[None, :]), 0), 1.0)
    column_parts = column_parts_ptr + (first_row // BLOCK_M).to(tl.int64) * n_columns
    tl.store(column_parts + columns, top + tl.log2(total), mask=column_valid)


@triton.jit
def _merge_parts(
    parts_ptr, lse_ptr, n_parts, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
):
    """Natural log-sum-exp of base-2 parts [n_parts, n_columns], and of what ``lse`` holds."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    if HAS_PREVIOUS:
        top = tl.load(lse_ptr + columns, mask=in_row, other=0.0) * LOG2_E
        total = tl.full([BLOCK_N], 1.0, tl.float32)
    else:
        top = tl.load(parts_ptr + columns, mask=in_row, other=0.0)
        total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n_parts, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # [BLOCK_M]
        offsets = (rows * n_columns)[:, None] + columns[None, :]
        valid = (rows < n_parts)[:, None] & in_row[None, :]
        parts = tl.load(parts_ptr + offsets, mask=valid, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(parts, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(parts - new_top[None, :]), 0)
        top = new_top
    tl.store(lse_ptr + columns, (top + tl.log2(total)) * LN_2, mask=in_row)


@triton.jit
def _softplus_parts(
    a_ptr, b_ptr, scale_ptr, bias_ptr, row_parts_ptr, n_rows, n_columns, n_dims, offset,
    stride_a, stride_b, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_row, first_column = _tile_place(n_rows, BLOCK_M, BLOCK_N)
    products = _products(
        a_ptr, b_ptr, first_row, first_column, n_rows, n_columns, n_dims, stride_a, stride_b,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )
    s = products * tl.load(scale_ptr) + tl.load(bias_ptr)  # [BLOCK_M, BLOCK_N]
    if _has_matched(first_row, first_column, offset, BLOCK_M, BLOCK_N):
        s = tl.where(_matched(first_row, first_column, offset, BLOCK_M, BLOCK_N), -s, s)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    if first_column + BLOCK_N > n_columns:
        s = tl.where((columns < n_columns)[None, :], s, float("-inf"))
    losses = softplus(s)
    row_parts = row_parts_ptr + (first_column // BLOCK_N).to(tl.int64) * n_rows
    tl.store(row_parts + rows, tl.sum(losses, 1), mask=rows < n_rows)


@triton.jit
def _score_gradients(
    a_ptr, b_ptr, scale_ptr, bias_ptr, row_grad_ptr, column_grad_ptr, matched_grad_ptr, row_ptr,
    column_ptr, ds_ptr, bias_grads_ptr, n_rows, n_columns, n_dims, offset, stride_a,
    stride_b, stride_ds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, SIGMOID: tl.constexpr, NEEDS_BIAS: tl.constexpr,
):
    first_row, first_column = _tile_place(n_rows, BLOCK_M, BLOCK_N)
    products = _products(
        a_ptr, b_ptr, first_row, first_column, n_rows, n_columns, n_dims, stride_a, stride_b,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    row_valid, column_valid = rows < n_rows, columns < n_columns
    row_grad = tl.load(row_grad_ptr + rows, mask=row_valid, other=0.0)[:, None]
    has_matched = _has_matched(first_row, first_column, offset, BLOCK_M, BLOCK_N)
    s = products * (tl.load(scale_ptr) * LOG2_E)  # [BLOCK_M, BLOCK_N]
    if SIGMOID:
        s += tl.load(bias_ptr) * LOG2_E
        if has_matched:
            s = tl.where(_matched(first_row, first_column, offset, BLOCK_M, BLOCK_N), -s, s)
        ds = row_grad / (1.0 + tl.exp2(-s))
        if has_matched:
            ds = tl.where(_matched(first_row, first_column, offset, BLOCK_M, BLOCK_N), -ds, ds)
    else:
        row = tl.load(row_ptr + rows, mask=row_valid, other=0.0)[:, None] * LOG2_E
        column = tl.load(column_ptr + columns, mask=column_valid, other=0.0)[None, :] * LOG2_E
        column_grad = tl.load(column_grad_ptr + columns, mask=column_valid, other=0.0)[None, :]
        ds = row_grad * tl.exp2(s - row) + column_grad * tl.exp2(s - column)
        if has_matched:
            matched_grad = tl.load(matched_grad_ptr + rows, mask=row_valid, other=0.0)[:, None]
            matched = _matched(first_row, first_column, offset, BLOCK_M, BLOCK_N)
            ds += tl.where(matched, matched_grad, 0.0)
    valid = row_valid[:, None] & column_valid[None, :]
    if NEEDS_BIAS:
        # This program's slot, to which the strips before this one have added theirs.
        slot = bias_grads_ptr + tl.program_id(0)
        tl.store(slot, tl.load(slot) + tl.sum(tl.where(valid, ds, 0.0)))
    # Within a tile 32 bits do, at half the registers.
    tile = ds_ptr + first_row.to(tl.int64) * stride_ds + first_column
    offsets = (tl.arange(0, BLOCK_M) * stride_ds)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    store(tile + offsets, ds, valid)


def row_and_column_lse(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 (log-sum-exp of each row [M], of each column [N], matched scores [M]).

    ``scale`` is a float32 tensor of one element; ``0 <= offset <= N - M``. Without rows the
    columns' are -inf.
    """
    row = torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    matched = torch.empty_like(row)
    column = torch.full((b.shape[0],), -torch.inf, dtype=torch.float32, device=a.device)
    for start, strip, b, config, constants in _strips(a, b, FORWARD_ROWS):
        row_parts = _parts(b, config.block_n, strip)
        column_parts = _parts(strip, config.block_m, b)
        rows = slice(start, start + strip.shape[0])
        launch(
            _score_parts, (row_parts.shape[0] * column_parts.shape[0],), config,
            strip, b, scale, row_parts, column_parts, matched[rows], strip.shape[0], b.shape[0],
            b.shape[1], start + offset, strip.stride(0), b.stride(0), **constants,
        )
        _merge(row_parts, row[rows], first=True)
        _merge(column_parts, column, first=start == 0)
    return row, column, matched


def softplus_sums(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, offset: int
) -> torch.Tensor:
    """float32 ``sum_j softplus(-z_ij * s_ij)`` of each row [M], of the sigmoid form."""
    losses = torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    for start, strip, b, config, constants in _strips(a, b, FORWARD_ROWS):
        parts = _parts(b, config.block_n, strip)
        blocks = configs.ceil_div(strip.shape[0], config.block_m)
        launch(
            _softplus_parts, (parts.shape[0] * blocks,), config,
            strip, b, scale, bias, parts, strip.shape[0], b.shape[0], b.shape[1],
            start + offset,
            strip.stride(0), b.stride(0), **constants,
        )
        losses[start : start + strip.shape[0]] = sum_partials(parts)
    return losses


def score_gradients(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    offset: int,
    grads: Sequence[torch.Tensor],
    lse: Sequence[torch.Tensor],
    bias_grad: torch.Tensor | None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, ``ds`` of a strip of rows [rows, N] in the dtype of ``a``), strip by strip.

    Each strip is in the memory of the one before. ``grads`` are those of rows, columns and matched
    scores, float32, ``lse`` the log-sum-exps of rows and columns; of the sigmoid form, which has
    a ``bias``, the gradients of the losses and none. The sum of ``ds`` is added to ``bias_grad``,
    of one element, at the end.
    """
    memory = slots = None
    row_grad, column_grad, matched_grad = (*grads, None, None)[:3]
    row, column = lse or (None, None)
    for start, strip, b, config, constants in _strips(a, b, BACKWARD_ROWS):
        n_rows, n_columns = strip.shape[0], b.shape[0]
        blocks = configs.ceil_div(n_rows, config.block_m)
        blocks *= configs.ceil_div(n_columns, config.block_n)
        if memory is None:
            # Rows of 16-byte pieces, which the products want.
            memory = strip.new_empty(n_rows, configs.ceil_div(n_columns, 16) * 16)
            slots = None if bias_grad is None else bias_grad.new_zeros(blocks)
        ds = memory[:n_rows, :n_columns]
        rows = slice(start, start + n_rows)
        launch(
            _score_gradients, (blocks,), config,
            strip, b, scale, bias, row_grad[rows], column_grad,
            None if matched_grad is None else matched_grad[rows],
            None if row is None else row[rows], column, ds, slots, n_rows, n_columns,
            b.shape[1], start + offset, strip.stride(0), b.stride(0), ds.stride(0), **constants,
            SIGMOID=bias is not None, NEEDS_BIAS=slots is not None,
        )
        yield start, ds
    if bias_grad is not None and slots is not None:
        bias_grad.add_(slots.sum())


def _strips(
    a: torch.Tensor, b: torch.Tensor, length: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, configs.PairConfig, dict[str, Any]]]:
    """(first row, strip of ``a``, ``b``, config, constants), as the kernels take them."""
    precision = configs.dot_precision(a.dtype)
    operands = precision if a.dtype == torch.float32 else "half"
    config = configs.pair_tile(operands, a.shape[0], b.shape[0], configs.target_of(a.device))
    constants = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PRECISION": precision,
    }  # fmt: skip
    a, b = (_aligned(t, config.block_k) for t in (a, b))
    for start in range(0, a.shape[0], length):
        yield start, a[start : start + length], b, config, constants


def _aligned(rows: torch.Tensor, block_k: int) -> torch.Tensor:
    """``rows`` itself if loads of 16 bytes can read it in blocks; else a copy, zeros behind it."""
    n_rows, n_dims = rows.shape
    whole = n_dims % block_k == 0 and rows.stride(1) == 1 and rows.stride(0) % 16 == 0
    if whole and (rows.is_meta or rows.data_ptr() % 16 == 0):
        return rows
    copy = rows.new_zeros(n_rows, configs.ceil_div(n_dims, block_k) * block_k)
    copy[:, :n_dims] = rows
    return copy


def _parts(over: torch.Tensor, block: int, of: torch.Tensor) -> torch.Tensor:
    """Memory for what each block of the rows of ``over`` gives to each row of ``of``."""
    n_blocks = configs.ceil_div(over.shape[0], block)
    return torch.empty((n_blocks, of.shape[0]), dtype=torch.float32, device=of.device)


def _merge(parts: torch.Tensor, lse: torch.Tensor, *, first: bool) -> None:
    n_parts, n_columns = parts.shape
    launch(
        _merge_parts, (configs.ceil_div(n_columns, 128),), configs.LaunchConfig(4, 2),
        parts, lse, n_parts, n_columns, BLOCK_M=16, BLOCK_N=128, HAS_PREVIOUS=not first,
    )
