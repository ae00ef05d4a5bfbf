"""Triton kernels for the emulator's tests."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from fusedformer_kernels.runtime.primitives import dot


@triton.jit
def product(
    a, b, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
    LEFT_TRANSPOSED: tl.constexpr, RIGHT_TRANSPOSED: tl.constexpr, IN_REGISTERS: tl.constexpr,
    PRECISION: tl.constexpr = "tf32",
):  # fmt: skip
    """Multiply two tiles, of which either may lie transposed in memory."""
    m, n, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, STEPS)
    if LEFT_TRANSPOSED:
        left = tl.load(a + k[:, None] * ROWS + m[None, :]).T
    else:
        left = tl.load(a + m[:, None] * STEPS + k[None, :])
    if RIGHT_TRANSPOSED:
        right = tl.load(b + n[:, None] * STEPS + k[None, :]).T
    else:
        right = tl.load(b + k[:, None] * COLUMNS + n[None, :])
    if IN_REGISTERS:
        wide = left.to(tl.float32)
        left = (wide + 0 * tl.exp2(wide)).to(right.dtype)
    result = dot(left, right, tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION)
    tl.store(c + m[:, None] * COLUMNS + n[None, :], result)


@triton.jit
def reductions(x, sums, most, where, scan, columns, COLUMNS: tl.constexpr):
    """Reduce and scan a row."""
    row, column = tl.program_id(0), tl.arange(0, COLUMNS)
    inside = column < columns
    values = tl.load(x + row * columns + column, mask=inside, other=0.0)
    tl.store(sums + row, tl.sum(values, 0))
    tl.store(scan + row * columns + column, tl.cumsum(values, 0), mask=inside)
    least = tl.where(inside, values, float("-inf"))
    tl.store(most + row, tl.max(least, 0))
    tl.store(where + row, tl.argmax(least, 0))
