"""Compute contrastive losses and gradients, from all pairs' scores, reduced tile by tile.

    s = scale * a @ b.T                            a: [M, D], b: [N, D]; row i and column i + offset
    row_i = logsumexp_j s_ij,  column_j = logsumexp_i s_ij,  matched_i = s_i,i+offset
    ds_ij = grow_i * exp(s_ij - row_i) + gcolumn_j * exp(s_ij - column_j) + gmatched_i * [matched]

and of the sigmoid form, z = 1 where matched and -1 elsewhere:

    s = scale * a @ b.T + bias,  loss_i = sum_j softplus(-z_ij * s_ij)
    ds_ij = -g_i * z_ij * sigmoid(-z_ij * s_ij)

A program computes a tile of BLOCK_M x BLOCK_N scores by a loop over D, and reduces it in registers.
Forward: to the log-sum-exp of the part of each row and each column that is in the tile (or
the sum of each row's softplus); ``_merge_parts`` then merges the parts in their order. Rows go in
strips of FORWARD_ROWS, so that there are at most FORWARD_ROWS / BLOCK_M parts of a column: parts
take FORWARD_ROWS * N / BLOCK_N + FORWARD_ROWS * N / BLOCK_M floats, which is linear in N.
Backward: scores are computed again, and a strip of BACKWARD_ROWS rows of ds is written in
the dtype of the inputs, for the products ds @ b and ds.T @ a, which are torch's. Scores are only
ever in registers, in float32.

Bytes: every tile reads BLOCK_M rows of a and BLOCK_N rows of b, from the L2 cache but for the
first; the forward writes parts alone, the backward M * N elements of ds, strip by strip. FLOPs:
2 * M * N * D each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.rows.reduction import sum_partials
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS, LN_2, LOG2_E, dot, fma, softplus, store

FORWARD_ROWS = 8192
BACKWARD_ROWS = 4096


@triton.jit
def _tile_place(n_rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Find (first row, first column) of this program's tile.

    Row blocks come first, so that programs that run together read few rows of b.
    """
    blocks = tl.cdiv(n_rows, BLOCK_M)
    return tl.program_id(0) % blocks * BLOCK_M, tl.program_id(0) // blocks * BLOCK_N


@triton.jit
def _products(
    a_ptr, b_ptr, first_row, first_column, n_rows, n_columns, n_dims, stride_a, stride_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute float32 ``a @ b.T`` of a tile [BLOCK_M, BLOCK_N].

    Rows and columns beyond the last repeat it, and dimensions are a multiple of BLOCK_K, so that
    the loop needs no mask.
    """
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
    """Find which pairs of a tile are matched [BLOCK_M, BLOCK_N]."""
    rows = first_row + offset + tl.arange(0, BLOCK_M)
    return rows[:, None] == (first_column + tl.arange(0, BLOCK_N))[None, :]


@triton.jit
def _has_matched(first_row, first_column, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tell whether any pair of a tile may be matched."""
    start = first_row + offset
    return (start < first_column + BLOCK_N) & (start + BLOCK_M > first_column)


@triton.jit
def _exp(x):
    """Compute exp of a difference, whose terms in base 2 would be rounded once more."""
    return tl.exp2(x * LOG2_E)


@triton.jit(do_not_specialize=COUNTS)
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
    s = products * tl.load(scale_ptr)  # [BLOCK_M, BLOCK_N]
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    row_valid, column_valid = rows < n_rows, columns < n_columns
    if (first_row + BLOCK_M > n_rows) | (first_column + BLOCK_N > n_columns):
        s = tl.where(row_valid[:, None] & column_valid[None, :], s, float("-inf"))
    top = tl.where(row_valid, tl.max(s, 1), 0.0)
    total = tl.where(row_valid, tl.sum(_exp(s - top[:, None]), 1), 1.0)
    row_parts = row_parts_ptr + (first_column // BLOCK_N).to(tl.int64) * n_rows
    tl.store(row_parts + rows, top + tl.log2(total) * LN_2, mask=row_valid)
    top = tl.where(column_valid, tl.max(s, 0), 0.0)
    total = tl.where(column_valid, tl.sum(_exp(s - top[None, :]), 0), 1.0)
    column_parts = column_parts_ptr + (first_row // BLOCK_M).to(tl.int64) * n_columns
    tl.store(column_parts + columns, top + tl.log2(total) * LN_2, mask=column_valid)
    if _has_matched(first_row, first_column, offset, BLOCK_M, BLOCK_N):
        matched = _matched(first_row, first_column, offset, BLOCK_M, BLOCK_N)
        here = (rows + offset >= first_column) & (rows + offset < first_column + BLOCK_N)
        found = tl.sum(tl.where(matched, s, 0.0), 1)
        tl.store(matched_ptr + rows, found, mask=row_valid & here)


@triton.jit(do_not_specialize=COUNTS)
def _merge_parts(
    parts_ptr, lse_ptr, n_parts, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
):
    """Merge parts [n_parts, n_columns], and the previous ``lse`` if there is one."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    if HAS_PREVIOUS:
        top = tl.load(lse_ptr + columns, mask=in_row, other=0.0)
        total = tl.full([BLOCK_N], 1.0, tl.float32)
    else:
        top = tl.load(parts_ptr + columns, mask=in_row, other=0.0)
        total = tl.where(in_row, 0.0, 1.0)
    for start in range(0, n_parts, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # [BLOCK_M]
        offsets = (rows * n_columns)[:, None] + columns[None, :]
        valid = (rows < n_parts)[:, None] & in_row[None, :]
        parts = tl.load(parts_ptr + offsets, mask=valid, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(parts, 0))
        total = total * _exp(top - new_top) + tl.sum(_exp(parts - new_top[None, :]), 0)
        top = new_top
    tl.store(lse_ptr + columns, top + tl.log2(total) * LN_2, mask=in_row)


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
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
    s = products * tl.load(scale_ptr)  # [BLOCK_M, BLOCK_N]
    if SIGMOID:
        s += tl.load(bias_ptr)
        if has_matched:
            s = tl.where(_matched(first_row, first_column, offset, BLOCK_M, BLOCK_N), -s, s)
        ds = row_grad / (1.0 + _exp(-s))
        if has_matched:
            ds = tl.where(_matched(first_row, first_column, offset, BLOCK_M, BLOCK_N), -ds, ds)
    else:
        row = tl.load(row_ptr + rows, mask=row_valid, other=0.0)[:, None]
        column = tl.load(column_ptr + columns, mask=column_valid, other=0.0)[None, :]
        column_grad = tl.load(column_grad_ptr + columns, mask=column_valid, other=0.0)[None, :]
        ds = fma(column_grad, _exp(s - column), row_grad * _exp(s - row))
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
    """Compute float32 (log-sum-exp of each row [M], of each column [N], matched scores [M]).

    ``scale`` is a float32 tensor of one element; ``0 <= offset <= N - M``. Without rows the
    columns' are -inf.
    """
    row = torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    matched = torch.empty_like(row)
    column = torch.full((b.shape[0],), -torch.inf, dtype=torch.float32, device=a.device)
    strips = _Strips.of(a, b, FORWARD_ROWS)
    for rows in strips.rows:
        strip = strips.a[rows]
        row_parts = _parts(strips.b, strips.config.block_n, strip)
        column_parts = _parts(strip, strips.config.block_m, strips.b)
        strips.launch(
            _score_parts, rows, (scale, row_parts, column_parts, matched[rows]), offset
        )
        _merge(row_parts, row[rows], first=True)
        _merge(column_parts, column, first=rows.start == 0)
    return row, column, matched


def softplus_sums(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, offset: int
) -> torch.Tensor:
    """Compute float32 ``sum_j softplus(-z_ij * s_ij)`` of each row [M], of the sigmoid form."""
    losses = torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    strips = _Strips.of(a, b, FORWARD_ROWS)
    for rows in strips.rows:
        parts = _parts(strips.b, strips.config.block_n, strips.a[rows])
        strips.launch(_softplus_parts, rows, (scale, bias, parts), offset)
        losses[rows] = sum_partials(parts)
    return losses


def score_gradients(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    offset: int,
    grads: Sequence[torch.Tensor | None],
    lse: Sequence[torch.Tensor | None],
    bias_grad: torch.Tensor | None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, their ``ds`` [rows, N] in the dtype of ``a``), strip by strip.

    Each strip overwrites the one before it.

    Args:
        grads: float32, of rows, of columns and of matched scores; of the sigmoid form, which has a
            ``bias``, of the losses, and None.
        lse: log-sum-exps of rows and columns, or None.
        bias_grad: one element, to which the sum of ``ds`` is added at the end.
    """
    row_grad, column_grad, matched_grad = grads
    row, column = lse
    strips = _Strips.of(a, b, BACKWARD_ROWS)
    if not strips.rows:
        return
    # Rows of whole 16-byte pieces, as the products want them.
    pitch = targets.ceil_div(b.shape[0], 16) * 16
    memory = a.new_empty(strips.rows[0].stop, pitch)
    slots = None if bias_grad is None else bias_grad.new_zeros(strips.blocks(strips.rows[0]))
    for rows in strips.rows:
        ds = memory[: rows.stop - rows.start, : b.shape[0]]
        vectors = (
            scale, bias, _part(row_grad, rows), column_grad, _part(matched_grad, rows),
            _part(row, rows), column, ds, slots,
        )  # fmt: skip
        strips.launch(
            _score_gradients, rows, vectors, offset, pitch, SIGMOID=bias is not None,
            NEEDS_BIAS=slots is not None,
        )
        yield rows, ds
    if bias_grad is not None and slots is not None:
        bias_grad.add_(slots.sum())


@dataclass(frozen=True)
class _Strips:
    """The rows of ``a`` in strips, each against all of ``b``, and the launches of their tiles."""

    a: torch.Tensor
    b: torch.Tensor
    rows: list[slice]
    config: configs.PairConfig
    precision: str

    @staticmethod
    def of(a: torch.Tensor, b: torch.Tensor, length: int) -> _Strips:
        """Cut ``a`` in strips of at most ``length`` rows."""
        n_rows = a.shape[0]
        rows = [slice(i, min(i + length, n_rows)) for i in range(0, n_rows, length)]
        target = targets.target_of(a.device)
        precision = targets.dot_precision(a.dtype)
        operands = precision if a.dtype == torch.float32 else "half"
        config = configs.pair_tile(operands, min(n_rows, length), b.shape[0], target)
        a, b = (_aligned(t, config.block_k) for t in (a, b))
        return _Strips(a, b, rows, config, precision)

    def blocks(self, rows: slice) -> int:
        """Count the tiles of a strip."""
        blocks = targets.ceil_div(rows.stop - rows.start, self.config.block_m)
        return blocks * targets.ceil_div(self.b.shape[0], self.config.block_n)

    def launch(
        self,
        kernel: Any,
        rows: slice,
        tensors: tuple[torch.Tensor | None, ...],
        offset: int,
        *strides: int,
        **flags: bool,
    ) -> None:
        """Run ``kernel`` on all tiles of a strip."""
        config = self.config
        launch(
            kernel, (self.blocks(rows),), config,
            self.a[rows], self.b, *tensors, rows.stop - rows.start, *self.b.shape,
            rows.start + offset, self.a.stride(0), self.b.stride(0), *strides,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PRECISION=self.precision, **flags,
        )


def _aligned(rows: torch.Tensor, block_k: int) -> torch.Tensor:
    """Return ``rows`` if loads of 16 bytes can read them in blocks, else a padded copy."""
    n_rows, n_dims = rows.shape
    whole = n_dims % block_k == 0 and rows.stride(1) == 1 and rows.stride(0) % 16 == 0
    if whole and (rows.is_meta or rows.data_ptr() % 16 == 0):
        return rows
    copy = rows.new_zeros(n_rows, targets.ceil_div(n_dims, block_k) * block_k)
    copy[:, :n_dims] = rows
    return copy


def _parts(over: torch.Tensor, block: int, of: torch.Tensor) -> torch.Tensor:
    """Allocate a number for each block of the rows of ``over`` and each row of ``of``."""
    n_blocks = targets.ceil_div(over.shape[0], block)
    return torch.empty((n_blocks, of.shape[0]), dtype=torch.float32, device=of.device)


def _part(vector: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if vector is None else vector[rows]


def _merge(parts: torch.Tensor, lse: torch.Tensor, *, first: bool) -> None:
    n_parts, n_columns = parts.shape
    launch(
        _merge_parts, (targets.ceil_div(n_columns, 128),), targets.LaunchConfig(4, 2),
        parts, lse, n_parts, n_columns, BLOCK_M=16, BLOCK_N=128, HAS_PREVIOUS=not first,
    )
