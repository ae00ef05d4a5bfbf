"""Device functions shared by the kernels."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Whether kernels run in Triton's interpreter; triton reads the variable once, when imported.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Float32 ``x`` rounded to the nearest value of DTYPE, ties to even."""
    if INTERPRET and DTYPE == tl.bfloat16:
        # The interpreter cuts off bits where hardware rounds.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def store(pointers, x, mask):
    """Store float32 ``x``, rounded to the dtype that ``pointers`` point to."""
    tl.store(pointers, cast(x, pointers.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` with float32 accumulation; PRECISION is that of float32 operands."""
    if INTERPRET:
        # The interpreter multiplies the raw bits of bfloat16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Hyperbolic tangent of float32; its series near 0, where the quotient would lose digits."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    quotient = (1.0 - e) / (1.0 + e)
    square = x * x
    series = square * 0.021869488536155203 - 0.05396825396825397
    series = series * square + 0.13333333333333333
    series = series * square - 0.3333333333333333
    series = x + x * (series * square)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def row_numbers(n_rows, BLOCK_M: tl.constexpr):
    """Rows of this program [BLOCK_M]: int64 where ``n_rows`` is, since that division is slow."""
    return (tl.program_id(0) + n_rows * 0) * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def row_offsets(rows, size_1, size_2, stride_0, stride_1, stride_2):
    """int64 offsets of rows that are numbered through three leading dimensions."""
    index_2 = (rows % size_2).to(tl.int64)
    index_1 = ((rows // size_2) % size_1).to(tl.int64)
    index_0 = (rows // (size_2 * size_1)).to(tl.int64)
    return index_0 * stride_0 + index_1 * stride_1 + index_2 * stride_2


@triton.jit
def dropout_keep(seed, plane, rows, first_column, p, BLOCK_N: tl.constexpr):
    """Which elements dropout keeps: a function of (seed, plane, row, column) alone.

    One Philox draw serves four neighbouring columns, so ``first_column`` is a multiple of 4; the
    mask does not depend on tile sizes. Source: Salmon et al., Parallel Random Numbers: As Easy as
    1, 2, 3, SC 2011.
    """
    groups = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    counter_row = rows.to(tl.uint32)[:, None]  # [BLOCK_M, 1]
    counter_column = groups.to(tl.uint32)[None, :]  # [1, BLOCK_N / 4]
    zero = counter_row * 0 + counter_column * 0
    a, b, c, d = tl.philox(seed, counter_column + zero, counter_row + zero, plane + zero, zero)
    bits = tl.join(tl.join(a, c), tl.join(b, d))  # [BLOCK_M, BLOCK_N / 4, 2, 2]
    bits = tl.reshape(bits, [rows.shape[0], BLOCK_N])
    # 24 bits, compared as integers: p = 0 keeps all, p = 1 nothing.
    threshold = (tl.zeros([1, 1], tl.float32) + p) * 16777216.0
    return (bits >> 8) >= threshold.to(tl.uint32)


@triton.jit
def dropout_scale(p):
    """The factor on kept elements, [1, 1]: 1 / (1 - p), and finite where nothing is kept."""
    return 1.0 / tl.maximum(1.0 - (tl.zeros([1, 1], tl.float32) + p), 1e-7)
