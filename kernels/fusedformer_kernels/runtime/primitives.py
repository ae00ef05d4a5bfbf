"""Device functions shared by the kernels."""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl
from triton.language.core import builtin

# Whether kernels run in Triton's interpreter; triton reads the variable once, when imported.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Parameters that say how many there are. Triton would compile a kernel anew for the values 1 and
# multiples of 16; ptxas does not survive each of those forms, and tests do not see each. They are
# parameters of their own: of numbers in a tuple Triton compiles each form, whatever it is told.
COUNTS = (
    "n_rows", "n_queries", "n_keys", "n_sequences", "n_parts", "n_dims", "capacity",
    "heads", "length", "lse_rows", "plane", "planes", "shared_batch", "shared_heads", "shares",
    "split_keys", "splits", "queries", "keys", "radius", "n_tokens", "n_positions", "n_types",
    "n_read", "n_written", "sum_tiles", "diagonals", "last_block", "chunks", "middle",
)  # fmt: skip


@builtin
def on_cuda(_semantic: Any = None) -> tl.constexpr:
    """Tell whether the kernel is compiled for a GPU of NVIDIA."""
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


@builtin
def reads_lanes(rows: tl.constexpr, _semantic: Any = None) -> tl.constexpr:
    """Tell whether a product of so many rows gets them by lanes (HMMA), not by warpgroups."""
    options = _semantic.builder.options
    wide = "90" in str(getattr(options, "arch", "")) and options.num_warps >= 4 and rows >= 64
    return tl.constexpr(options.backend_name == "cuda" and not wide)


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
def fma(a, b, c):
    """``a * b + c`` of float32, rounded once.

    The compiler fuses nothing by itself (``LaunchConfig.options``), so that a kernel computes the
    same bits in every form of it, by every version, and in the interpreter.
    """
    if INTERPRET:  # whose own rounds twice
        return (tl.cast(a, tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def negative(x):
    """``-x``, which costs nothing in a sum or product; Triton's own is the difference 0 - x."""
    return x * -1.0


@triton.jit
def store(pointers, x, mask):
    """Store float32 ``x``, rounded to the dtype that ``pointers`` point to; all if no ``mask``."""
    tl.store(pointers, cast(x, pointers.dtype.element_ty), mask=mask)


@triton.jit
def let_next_begin(OVERLAPS: tl.constexpr):
    """Let the next launch begin before this one has ended; see ``targets.OverlappingConfig``."""
    if OVERLAPS:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False,
            pack=1,
        )


@triton.jit
def wait_for_last(OVERLAPS: tl.constexpr):
    """Wait until the launch before this one has ended and its writes are there."""
    if OVERLAPS:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` with float32 accumulation; PRECISION is that of float32 operands."""
    if INTERPRET:
        # The interpreter multiplies the raw bits of bfloat16. And its sums depend on the shapes of
        # tiles, where compiled code adds products in one order, whichever operand comes first: the
        # backward finds the very scores of the forward again. So here they are rounded once.
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return product.to(tl.float32) + acc
    if PRECISION == "tf32x3" and a.dtype == tl.float32:
        return acc + _dot_tf32x3(a, b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def once_each(x):
    """``x`` [rows, sums], made by a dropout, so that a product adds each element once.

    Triton lays the operands of a product by HMMA out by the narrowest load that they come from,
    halved by a ``join``: of a mask's bytes and dropout's bits eight elements a lane. Those are more
    than 16 has for four lanes, which then have all of them twice, and what is added is doubled. An
    instruction hides where ``x`` comes from.
    """
    ROWS: tl.constexpr = x.shape[0]
    SUMS: tl.constexpr = x.shape[1]
    if not INTERPRET and SUMS < 32 and reads_lanes(ROWS):
        if x.dtype == tl.float32:
            x = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=f,f", [x], dtype=x.dtype, is_pure=False, pack=1
            )
        else:
            x = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
            )
    return x


@triton.jit
def _to_tf32(x):
    """Float32 ``x`` rounded to the 11 bits that tensor cores read, ties away from zero."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _dot_tf32x3(a, b):
    """``a @ b`` of float32 by three products of TF32: of what each is rounded to, and the rests.

    Triton's own form adds the rests one onto the other. Their sum here is the same to the bit if
    the operands change places, as the backward needs that computes scores again, transposed.
    """
    a_high, b_high = _to_tf32(a), _to_tf32(b)
    of_a = tl.dot(a - a_high, b_high, input_precision="tf32")
    of_b = tl.dot(a_high, b - b_high, input_precision="tf32")
    rests = fma(of_a, 1.0, of_b)  # Triton would make one product add onto the other of a plain sum
    # The rest of an infinity is NaN: then the main product alone says what comes out.
    return tl.dot(a_high, b_high, tl.where(rests == rests, rests, 0.0), input_precision="tf32")


@triton.jit
def tanh(x):
    """Hyperbolic tangent of float32; its series near 0, where the quotient would lose digits."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    quotient = (1.0 - e) / (1.0 + e)
    square = x * x
    series = fma(square, 0.021869488536155203, -0.05396825396825397)
    series = fma(series, square, 0.13333333333333333)
    series = fma(series, square, -0.3333333333333333)
    series = fma(x, series * square, x)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def softplus(x):
    """``log(1 + exp(x))`` of float32, to 2e-7 of itself: a polynomial where log1p would stand."""
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    ratio = fma(e, 0.005232676863670349, -0.02950516901910305)
    ratio = fma(ratio, e, 0.07822583615779877)
    ratio = fma(ratio, e, -0.13663235306739807)
    ratio = fma(ratio, e, 0.19106002151966095)
    ratio = fma(ratio, e, -0.2484298050403595)
    ratio = fma(ratio, e, 0.3331909775733948)
    ratio = fma(ratio, e, -0.4999949336051941)
    ratio = fma(ratio, e, 0.9999999403953552)  # log1p(e) / e on [0, 1]
    return fma(ratio, e, tl.maximum(x, 0.0))


@triton.jit
def online_sum(top, total, scores):
    """(largest score, sum of exp(score - largest)) of rows [BLOCK_M, 1], with one tile more."""
    new_top = tl.maximum(top, tl.max(scores, 1)[:, None])
    # -inf so far is no error yet: a later tile may hold the first finite score.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    total = total * tl.exp2((top - base) * LOG2_E)
    total += tl.sum(tl.exp2((scores - base) * LOG2_E), 1)[:, None]
    return new_top, total


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
def dropout_key(seed, plane):
    """(key, offset) of the mask ``plane`` of an int64 seed: the stream that its elements draw."""
    plane = tl.cast(plane, tl.uint32)
    zero = plane * 0
    key, offset, _, _ = tl.philox(seed, plane, zero, zero, zero)
    return key, offset


@triton.jit
def _philox_product(a):
    """Compute the lower and the upper 32 bits of uint32 ``a`` times Philox's multiplier."""
    if not INTERPRET:  # noqa: SIM102 (the interpreter knows no backend)
        if on_cuda():
            # One instruction. The compiler would make two of what is below, or of an int64 product.
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b64 product;
                mul.wide.u32 product, $2, 0xD256D193;
                mov.b64 {$0, $1}, product;
                }""",
                "=r,=r,r", [a], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
            )
            return low, high
    multiplier = a * 0 + 0xD256D193
    return a * multiplier, tl.umulhi(a, multiplier)


@triton.jit
def kept_or_zero(keep, x):
    """Float32 ``x`` where ``keep``, else 0, to be rounded to half precision next."""
    x = tl.where(keep, x, 0.0)
    if not INTERPRET:  # noqa: SIM102 (the interpreter knows no backend)
        if on_cuda():
            # Not seen through: the compiler would select after the rounding, each half of a
            # register by itself.
            x = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
            )
    return x


@triton.jit
def _keep_four(key, offset, row, column, p):
    """Which of the four elements of each counter dropout keeps: two more dimensions of size 2.

    Philox-2x32, seven rounds, 16 bits an element. Source: Salmon et al., Parallel Random Numbers:
    As Easy as 1, 2, 3, SC 2011.
    """
    zero = row * 0 + column * 0
    first = (row ^ offset) + zero
    second = column + zero
    for _ in tl.static_range(7):
        low, high = _philox_product(first)
        second, first = low, high ^ key ^ second
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)
    pairs = tl.join(first, second)
    # 16 bits are compared as the upper half of an integer, whatever is below them: p = 1 keeps
    # nothing, and a p that rounds to 0 drops every 2**17th. Without dropout nothing is drawn.
    threshold = ((tl.zeros([1, 1, 1, 1, 1], tl.float32) + p) * 65536.0 + 0.5).to(tl.uint32)
    last_dropped = tl.where(threshold > 0, (threshold << 16) + 0xFFFFFFFF, 0)
    return tl.join(pairs << 16, pairs) > last_dropped


@triton.jit
def dropout_keep(seed, plane, rows, first_column, p, BLOCK_N: tl.constexpr):
    """Which elements of rows dropout keeps: a function of (seed, plane, row, column) alone.

    One draw serves four neighbouring columns, as a thread has them that copies rows;
    ``first_column`` is a multiple of 4.
    """
    key, offset = dropout_key(seed, plane)
    groups = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    row, column = rows.to(tl.uint32)[:, None], groups.to(tl.uint32)[None, :]
    return tl.reshape(_keep_four(key, offset, row, column, p), [rows.shape[0], BLOCK_N])


@triton.jit
def dropout_keep_tile(
    key, offset, first_row, first_column, p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Which elements of a tile dropout keeps: a function of (key, offset, row, column) alone.

    One draw serves rows i and i + 8 of columns j and j + 8, which one thread holds of a product's
    result, transposed or not; the first row and column are multiples of 16.
    """
    eight = tl.arange(0, 8)
    rows = first_row + 16 * tl.arange(0, BLOCK_M // 16)[:, None] + eight[None, :]
    columns = first_column + 16 * tl.arange(0, BLOCK_N // 16)[:, None] + eight[None, :]
    row = tl.reshape(rows.to(tl.uint32), [BLOCK_M // 2])[:, None]
    column = tl.reshape(columns.to(tl.uint32), [BLOCK_N // 2])[None, :]
    keep = _keep_four(key, offset, row, column, p)
    keep = tl.reshape(keep, [BLOCK_M // 16, 8, BLOCK_N // 16, 8, 2, 2])
    return tl.reshape(tl.permute(keep, [0, 4, 1, 2, 5, 3]), [BLOCK_M, BLOCK_N])


@triton.jit
def kept_share(p):
    """The share of elements that dropout keeps, [1, 1]: 1 - p, and above 0 where it keeps none."""
    return tl.maximum(1.0 - (tl.zeros([1, 1], tl.float32) + p), 1e-7)


@triton.jit
def dropout_scale(p):
    """The factor on kept elements, [1, 1]: 1 / (1 - p), and finite where nothing is kept."""
    return 1.0 / kept_share(p)
