"""Compute softmax and log_softmax over the last axis of a strided 4-D view, masked or causal.

    s = scale * x + mask;  y = exp(s - max(s)) / sum(exp(s - max(s)))     or its logarithm

A row of up to 32,768 columns (backward 16,384) is kept in registers: each input element is read
once and each output element written once, the fewest bytes there are. One program computes
BLOCK_M such rows. Longer rows get a program each that reads them twice: an online pass for the
maximum and the sum, then one that writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.rows.softmax_long import long_softmax_backward, long_softmax_forward
from fusedformer_kernels.rows.softmax_tiles import (
    ADDITIVE,
    BOOLEAN,
    NO_MASK,
    load_output_and_grad,
    load_scores,
    score_gradient,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    LN_2,
    LOG2_E,
    row_numbers,
    row_offsets,
    store,
)
from fusedformer_kernels.runtime.strided import collapsed, contiguous_like

_NO_MASK = tl.constexpr(NO_MASK)


@triton.jit(do_not_specialize=COUNTS)
def _softmax_forward(
    x_ptr, mask_ptr, y_ptr, scale, n_rows, n_columns, size_1, size_2,
    stride_x0, stride_x1, stride_x2, stride_x, stride_m0, stride_m1, stride_m2, stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    LOG: tl.constexpr, SCALED: tl.constexpr,
):
    rows = row_numbers(n_rows, BLOCK_M)  # [BLOCK_M]
    columns = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]  # [1, BLOCK_N]
    row_valid = (rows < n_rows)[:, None]
    row_index = (rows % size_2)[:, None]
    x_rows = x_ptr + row_offsets(rows, size_1, size_2, stride_x0, stride_x1, stride_x2)[:, None]
    mask_rows = mask_ptr
    if MASK != _NO_MASK:
        mask_rows += row_offsets(rows, size_1, size_2, stride_m0, stride_m1, stride_m2)[:, None]
    y_rows = y_ptr + (rows.to(tl.int64) * n_columns)[:, None]
    in_row = columns < n_columns
    s = load_scores(
        x_rows, mask_rows, columns, row_index, in_row, in_row & row_valid, stride_x, stride_m,
        scale, MASK, IS_CAUSAL, SCALED,
    )  # [BLOCK_M, BLOCK_N]
    top = tl.where(row_valid, tl.max(s, 1)[:, None], 0.0)  # [BLOCK_M, 1]
    if MASK != _NO_MASK or IS_CAUSAL:
        top = tl.where(top == float("-inf"), 0.0, top)
    # Not one multiply-add: of rows at a dtype's lowest value the product would overflow.
    shifted = s - top
    weights = tl.exp2(shifted * LOG2_E)
    total = tl.where(row_valid, tl.sum(weights, 1)[:, None], 1.0)
    if MASK != _NO_MASK or IS_CAUSAL:
        total = tl.where(total == 0.0, 1.0, total)
    y = shifted - tl.log2(total) * LN_2 if LOG else weights * (1.0 / total)
    store(y_rows + columns, y, in_row & row_valid)


@triton.jit(do_not_specialize=COUNTS)
def _softmax_backward(
    dy_ptr, y_ptr, dx_ptr, scale, n_rows, n_columns, size_1, size_2,
    stride_dy0, stride_dy1, stride_dy2, stride_dy, stride_y0, stride_y1, stride_y2, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, LOG: tl.constexpr,
):
    rows = row_numbers(n_rows, BLOCK_M)  # [BLOCK_M]
    columns = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]  # [1, BLOCK_N]
    row_valid = (rows < n_rows)[:, None]
    y_rows = y_ptr + row_offsets(rows, size_1, size_2, stride_y0, stride_y1, stride_y2)[:, None]
    dy_rows = (
        dy_ptr + row_offsets(rows, size_1, size_2, stride_dy0, stride_dy1, stride_dy2)[:, None]
    )
    dx_rows = dx_ptr + (rows.to(tl.int64) * n_columns)[:, None]
    valid = (columns < n_columns) & row_valid
    y, dy = load_output_and_grad(
        y_rows, dy_rows, columns, valid, stride_y, stride_dy, LOG
    )  # [BLOCK_M, BLOCK_N]
    total = tl.sum(dy if LOG else dy * y, 1)[:, None]
    store(dx_rows + columns, score_gradient(y, dy, total, MASKED, LOG) * scale, valid)


@planned
def softmax_forward(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    dtype: torch.dtype,
    log: bool,
) -> torch.Tensor:
    """Compute ``softmax(scale * x + mask)`` over the last axis, contiguous, in ``dtype``.

    ``mask`` has the shape of ``x`` (strides may be 0); boolean keeps, floating-point is added.
    """
    y = contiguous_like(x, dtype)
    if y.numel() == 0:
        return y
    tensors = [x] if mask is None else [x, mask]
    (view, *masks), _ = collapsed(tensors, keep_rows=is_causal)
    mask_view = masks[0] if masks else None
    kind = NO_MASK
    if mask_view is not None:
        kind = BOOLEAN if mask_view.dtype == torch.bool else ADDITIVE
        mask_view = mask_view.view(torch.uint8) if kind == BOOLEAN else mask_view
    n_columns = view.shape[3]
    n_rows = view.numel() // n_columns
    flags = {"MASK": kind, "IS_CAUSAL": is_causal, "LOG": log, "SCALED": scale != 1.0}
    if n_columns > configs.SOFTMAX_ONE_PASS:
        long_softmax_forward(view, mask_view, y, scale, **flags)
        return y
    config = configs.row_tile(
        "softmax_forward", n_columns, configs.SOFTMAX_ONE_PASS, 4096, 32,
        targets.target_of(x.device),
    )
    launch(
        _softmax_forward, (targets.ceil_div(n_rows, config.block_m),), config,
        view, mask_view, y, scale, n_rows, n_columns, view.shape[1], view.shape[2],
        *view.stride(), *((0, 0, 0, 0) if mask_view is None else mask_view.stride()),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, **flags,
    )
    return y


@planned
def softmax_backward(
    dy: torch.Tensor, y: torch.Tensor, scale: float, dtype: torch.dtype, log: bool, masked: bool
) -> torch.Tensor:
    """Compute the gradient of ``x``, contiguous in ``dtype``, from ``y = softmax(...)``."""
    dx = contiguous_like(y, dtype)
    if dx.numel() == 0:
        return dx
    (dy_view, y_view), _ = collapsed([dy, y])
    n_columns = y_view.shape[3]
    n_rows = y_view.numel() // n_columns
    if n_columns > configs.SOFTMAX_BACKWARD_ONE_PASS:
        long_softmax_backward(dy_view, y_view, dx, scale, MASKED=masked, LOG=log)
        return dx
    config = configs.row_tile(
        "softmax_backward", n_columns, configs.SOFTMAX_BACKWARD_ONE_PASS, 4096, 16,
        targets.target_of(y.device),
    )
    launch(
        _softmax_backward, (targets.ceil_div(n_rows, config.block_m),), config,
        dy_view, y_view, dx, scale, n_rows, n_columns, y_view.shape[1], y_view.shape[2],
        *dy_view.stride(), *y_view.stride(),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, MASKED=masked, LOG=log,
    )
    return dx
