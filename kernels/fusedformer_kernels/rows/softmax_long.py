"""Compute softmax of rows that are too long for registers, and its gradient.

A row is read twice, in chunks of BLOCK_N columns. First for its statistics: those of each chunk go
to memory, and are merged from there. Then to write, from the row's end on, which the cache has had
last. With rows enough for all SMs one program does both. With fewer, each chunk gets a program of
its own, in two launches of the same code: the first ends with the statistics of chunks, the second
begins there, on sm_90 while the first one ends. So the bits of a row do not depend on how many
others there are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.rows.softmax_tiles import (
    NO_MASK,
    load_float32,
    load_output_and_grad,
    load_scores,
    score_gradient,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    LN_2,
    LOG2_E,
    let_next_begin,
    row_offsets,
    store,
    wait_for_last,
)

_NO_MASK = tl.constexpr(NO_MASK)


@triton.jit
def _row_and_first_chunk(n_rows, splits):
    """Find this program's row, int64 where ``n_rows`` is, and its first chunk."""
    program = tl.program_id(0) + n_rows * 0
    return program // splits, program % splits


@triton.jit
def _merged(parts, n_parts, n_written, PARTS: tl.constexpr):
    """Merge (largest score, sum of exp(score - largest)) of a row's chunks; see where they went."""
    tl.debug_barrier()  # one thread has written what all read
    index = tl.arange(0, PARTS)
    # A program that writes nothing has no use for them, and others may not be done.
    there = (index < n_parts) & (n_written > 0)
    tops = tl.load(parts + index, mask=there, other=float("-inf"))
    totals = tl.load(parts + n_parts + index, mask=there, other=0.0)
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(totals * tl.exp2((tops - base) * LOG2_E), 0)


@triton.jit
def _chunk(index, n_columns, BLOCK_N: tl.constexpr):
    """Columns of a chunk (int64) [BLOCK_N], and which of them are in the row."""
    start = tl.cast(index, tl.int64) * BLOCK_N
    columns = tl.arange(0, BLOCK_N)
    return start + columns, columns < n_columns - start


@triton.jit
def _chunk_scores(
    x_row, mask_row, row_index, index, n_columns, stride_x, stride_m, scale,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, SCALED: tl.constexpr,
    CHECKED: tl.constexpr,
):
    columns, in_row = _chunk(index, n_columns, BLOCK_N)
    valid = in_row if CHECKED else None
    return load_scores(
        x_row, mask_row, columns, row_index, valid, valid, stride_x, stride_m, scale, MASK,
        IS_CAUSAL, SCALED,
    )  # [BLOCK_N]


@triton.jit
def _store_statistics(parts, index, n_parts, s):
    """Store the largest of a chunk's scores [BLOCK_N], and the sum of exp(score - largest)."""
    top = tl.max(s, 0)
    # -inf is no error yet: another chunk may hold the first finite score.
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(parts + index, top)
    tl.store(parts + n_parts + index, tl.sum(tl.exp2((s - base) * LOG2_E), 0))


@triton.jit
def _write_softmax(
    y_row, s, index, n_columns, top, factor, BLOCK_N: tl.constexpr, LOG: tl.constexpr,
    CHECKED: tl.constexpr,
):
    columns, in_row = _chunk(index, n_columns, BLOCK_N)
    shifted = s - top
    y = shifted - factor if LOG else tl.exp2(shifted * LOG2_E) * factor
    store(y_row + columns, y, in_row if CHECKED else None)


@triton.jit(do_not_specialize=COUNTS)
def _long_softmax_forward(
    x_ptr, mask_ptr, y_ptr, parts_ptr, scale, n_rows, n_columns, size_1, size_2,
    splits, n_parts, n_read, n_written,
    stride_x0, stride_x1, stride_x2, stride_x, stride_m0, stride_m1, stride_m2, stride_m,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, MASK: tl.constexpr,
    IS_CAUSAL: tl.constexpr, LOG: tl.constexpr, SCALED: tl.constexpr, LETS: tl.constexpr,
    WAITS: tl.constexpr,
):
    let_next_begin(LETS)
    wait_for_last(WAITS)
    row, first = _row_and_first_chunk(n_rows, splits)
    full = n_columns // BLOCK_N  # chunks; one more may be there
    row_index = row % size_2
    x_row = x_ptr + row_offsets(row, size_1, size_2, stride_x0, stride_x1, stride_x2)
    mask_row = mask_ptr
    if MASK != _NO_MASK:
        mask_row += row_offsets(row, size_1, size_2, stride_m0, stride_m1, stride_m2)
    y_row = y_ptr + row.to(tl.int64) * n_columns
    parts = parts_ptr + row.to(tl.int64) * n_parts * 2
    for index in tl.range(first, tl.minimum(first + n_read, full), num_stages=STAGES):
        s = _chunk_scores(
            x_row, mask_row, row_index, index, n_columns, stride_x, stride_m, scale, BLOCK_N, MASK,
            IS_CAUSAL, SCALED, False,
        )  # [BLOCK_N]
        _store_statistics(parts, index, n_parts, s)
    if first + n_read > full:
        s = _chunk_scores(
            x_row, mask_row, row_index, full, n_columns, stride_x, stride_m, scale, BLOCK_N, MASK,
            IS_CAUSAL, SCALED, True,
        )  # [BLOCK_N]
        _store_statistics(parts, full, n_parts, s)
    top, total = _merged(parts, n_parts, n_written, PARTS)
    if MASK != _NO_MASK or IS_CAUSAL:
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.where(total == 0.0, 1.0, total)
    factor = tl.log2(total) * LN_2 if LOG else 1.0 / total
    if first + n_written > full:
        s = _chunk_scores(
            x_row, mask_row, row_index, full, n_columns, stride_x, stride_m, scale, BLOCK_N, MASK,
            IS_CAUSAL, SCALED, True,
        )  # [BLOCK_N]
        _write_softmax(y_row, s, full, n_columns, top, factor, BLOCK_N, LOG, True)
    end = tl.minimum(first + n_written, full)
    for back in tl.range(first, end, num_stages=STAGES):
        index = first + end - 1 - back
        s = _chunk_scores(
            x_row, mask_row, row_index, index, n_columns, stride_x, stride_m, scale, BLOCK_N, MASK,
            IS_CAUSAL, SCALED, False,
        )  # [BLOCK_N]
        _write_softmax(y_row, s, index, n_columns, top, factor, BLOCK_N, LOG, False)


@triton.jit
def _chunk_sum(
    dy_row, y_row, index, n_columns, stride_dy, stride_y, BLOCK_N: tl.constexpr,
    LOG: tl.constexpr, CHECKED: tl.constexpr,
):
    """Sum ``dy * y`` (log: ``dy``) over a chunk."""
    columns, in_row = _chunk(index, n_columns, BLOCK_N)
    valid = in_row if CHECKED else None
    products = load_float32(dy_row + columns * stride_dy, valid, 0.0)  # [BLOCK_N]
    if not LOG:
        products *= load_float32(y_row + columns * stride_y, valid, 0.0)
    return tl.sum(products, 0)


@triton.jit
def _write_gradient(
    dx_row, dy_row, y_row, index, n_columns, total, stride_dy, stride_y, scale,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, LOG: tl.constexpr, CHECKED: tl.constexpr,
):
    columns, in_row = _chunk(index, n_columns, BLOCK_N)
    valid = in_row if CHECKED else None
    y, dy = load_output_and_grad(y_row, dy_row, columns, valid, stride_y, stride_dy, LOG)
    store(dx_row + columns, score_gradient(y, dy, total, MASKED, LOG) * scale, valid)


@triton.jit(do_not_specialize=COUNTS)
def _long_softmax_backward(
    dy_ptr, y_ptr, dx_ptr, parts_ptr, scale, n_rows, n_columns, size_1, size_2,
    splits, n_parts, n_read, n_written,
    stride_dy0, stride_dy1, stride_dy2, stride_dy, stride_y0, stride_y1, stride_y2, stride_y,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr,
    LOG: tl.constexpr, LETS: tl.constexpr, WAITS: tl.constexpr,
):
    let_next_begin(LETS)
    wait_for_last(WAITS)
    row, first = _row_and_first_chunk(n_rows, splits)
    full = n_columns // BLOCK_N  # chunks; one more may be there
    y_row = y_ptr + row_offsets(row, size_1, size_2, stride_y0, stride_y1, stride_y2)
    dy_row = dy_ptr + row_offsets(row, size_1, size_2, stride_dy0, stride_dy1, stride_dy2)
    dx_row = dx_ptr + row.to(tl.int64) * n_columns
    parts = parts_ptr + row.to(tl.int64) * n_parts
    for index in tl.range(first, tl.minimum(first + n_read, full), num_stages=STAGES):
        part = _chunk_sum(dy_row, y_row, index, n_columns, stride_dy, stride_y, BLOCK_N, LOG, False)
        tl.store(parts + index, part)
    if first + n_read > full:
        part = _chunk_sum(dy_row, y_row, full, n_columns, stride_dy, stride_y, BLOCK_N, LOG, True)
        tl.store(parts + full, part)
    tl.debug_barrier()  # one thread has written what all read
    index = tl.arange(0, PARTS)
    there = (index < n_parts) & (n_written > 0)
    total = tl.sum(tl.load(parts + index, mask=there, other=0.0), 0)
    if first + n_written > full:
        _write_gradient(
            dx_row, dy_row, y_row, full, n_columns, total, stride_dy, stride_y, scale, BLOCK_N,
            MASKED, LOG, True,
        )
    end = tl.minimum(first + n_written, full)
    for back in tl.range(first, end, num_stages=STAGES):
        _write_gradient(
            dx_row, dy_row, y_row, first + end - 1 - back, n_columns, total, stride_dy, stride_y,
            scale, BLOCK_N, MASKED, LOG, False,
        )


def long_softmax_forward(
    x: torch.Tensor, mask: torch.Tensor | None, y: torch.Tensor, scale: float, **flags: Any
) -> None:
    """Write the softmax of rows of 4-D views to ``y``; ``flags`` are constants of the kernel."""
    _launch(_long_softmax_forward, x, mask, y, scale, 2, flags)


def long_softmax_backward(
    dy: torch.Tensor, y: torch.Tensor, dx: torch.Tensor, scale: float, **flags: Any
) -> None:
    """Write the gradient of scores to ``dx``, of 4-D views; ``flags`` as above."""
    _launch(_long_softmax_backward, dy, y, dx, scale, 1, flags)


def _launch(
    kernel: Any,
    first: torch.Tensor,
    second: torch.Tensor | None,
    written: torch.Tensor,
    scale: float,
    statistics: int,
    flags: dict[str, Any],
) -> None:
    """Launch a kernel that reads two tensors, and keeps some statistics of each chunk."""
    n_columns = first.shape[3]
    n_rows = first.numel() // n_columns
    read = (first,) if second is None else (first, second)
    itemsizes = tuple(tensor.element_size() for tensor in read)
    target = targets.target_of(first.device)
    config = configs.long_rows(n_rows, n_columns, itemsizes, target)
    n_parts = targets.ceil_div(n_columns, config.block_n)
    parts = torch.empty(n_rows * n_parts * statistics, dtype=torch.float32, device=first.device)
    chunks = ((1, 0), (0, 1)) if config.splits > 1 else ((n_parts, n_parts),)
    overlaps = target.overlaps and config.splits > 1
    for n_read, n_written in chunks:
        waits = overlaps and not n_read
        early = targets.OverlappingConfig(config.num_warps, config.num_stages)
        launch(
            kernel, (n_rows * config.splits,), early if waits else config,
            first, second, written, parts, scale, n_rows, n_columns, first.shape[1],
            first.shape[2], config.splits, n_parts, n_read, n_written, *first.stride(),
            *((0, 0, 0, 0) if second is None else second.stride()),
            BLOCK_N=config.block_n, STAGES=config.num_stages,
            PARTS=targets.next_power_of_2(n_parts), **flags, LETS=overlaps and not waits,
            WAITS=waits,
        )
