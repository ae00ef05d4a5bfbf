"""Load and compute tiles of softmax and its gradient, for rows that are short or long."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedformer_kernels.runtime.primitives import LOG2_E

NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2
_ADDITIVE, _BOOLEAN = tl.constexpr(ADDITIVE), tl.constexpr(BOOLEAN)


@triton.jit
def load_float32(pointers, valid, OTHER: tl.constexpr):
    """Load a tile to float32, OTHER outside of ``valid``; all of it if that is None."""
    if valid is None:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=valid, other=OTHER)
    return tile.to(tl.float32)


@triton.jit
def load_scores(
    x_rows, mask_rows, columns, row_index, in_row, valid, stride_x, stride_mask, scale,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, SCALED: tl.constexpr,
):
    """Load float32 scores [BLOCK_M, BLOCK_N], -inf where masked or outside the columns.

    ``valid`` leaves out rows that are not there, too; both are None where all is there.
    """
    if not SCALED and MASK != _ADDITIVE:  # the load puts -inf where it belongs
        scores = load_float32(x_rows + columns * stride_x, valid, float("-inf"))
    else:
        scores = load_float32(x_rows + columns * stride_x, valid, 0.0) * scale
        if in_row is not None:
            scores = tl.where(in_row, scores, float("-inf"))
    if MASK == _BOOLEAN:
        marks = mask_rows + columns * stride_mask
        keep = tl.load(marks) if valid is None else tl.load(marks, mask=valid, other=0)
        scores = tl.where(keep != 0, scores, float("-inf"))
    if MASK == _ADDITIVE:
        scores += load_float32(mask_rows + columns * stride_mask, valid, 0.0)
    if IS_CAUSAL:
        scores = tl.where(columns <= row_index, scores, float("-inf"))
    return scores


@triton.jit
def load_output_and_grad(
    y_rows, dy_rows, columns, valid, stride_y, stride_dy, LOG: tl.constexpr
):
    """float32 (output, its gradient) of a tile; outside it the output counts as 0 (log: -inf)."""
    y = load_float32(y_rows + columns * stride_y, valid, float("-inf") if LOG else 0.0)
    dy = load_float32(dy_rows + columns * stride_dy, valid, 0.0)
    return y, dy


@triton.jit
def score_gradient(y, dy, total, MASKED: tl.constexpr, LOG: tl.constexpr):
    """Compute the gradient of scores from the row sum of ``dy * y`` (log: of ``dy``)."""
    if LOG:
        ds = dy - tl.exp2(y * LOG2_E) * total
        if MASKED:
            ds = tl.where(y == float("-inf"), 0.0, ds)
    else:
        ds = y * (dy - total)
    return ds
