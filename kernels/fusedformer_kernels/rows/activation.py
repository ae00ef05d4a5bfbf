"""Apply bias, activation and dropout to each element of rows, forward and backward.

    y = dropout(activation(x + bias))

Forward: a program per [BLOCK_M, BLOCK_N] tile reads x once and writes y once. Backward: programs
walk the rows of a block of columns, recompute ``activation'(x + bias)``, write dx and keep the
bias gradient in registers; :mod:`reduction` adds their partial sums. Reads x and dy, writes dx.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.rows.reduction import column_sums, sum_partials
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    LOG2_E,
    dropout_keep,
    dropout_scale,
    fma,
    let_next_begin,
    negative,
    store,
)
from fusedformer_kernels.runtime.strided import contiguous_like, contiguous_vector, rows_of

ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "quick_gelu": 4}
_RELU, _GELU, _GELU_TANH, _SILU, _QUICK_GELU = map(tl.constexpr, ACTIVATIONS.values())
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_GELU_CUBIC = tl.constexpr(0.044715)
_QUICK = tl.constexpr(1.702)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def _gelu_inner(x):
    """Compute twice the argument of tanh in GELU's approximation by it."""
    factor = fma(x * x, 2.0 * _GELU_CUBIC * _SQRT_2_OVER_PI, 2.0 * _SQRT_2_OVER_PI)
    return x * factor


@triton.jit
def _normal(x):
    """Compute (cumulative distribution, exp(-x**2 / 2)) of the standard normal distribution.

    erfc(z) = exp(-z**2) * t * polynomial(t), t = 1 / (1 + 0.3 z), z >= 0: the form of Hastings
    (Abramowitz and Stegun 7.1.26), coefficients fitted to a relative error of 2e-8 up to z = 9.5.
    Half of it is a tail of the distribution: the code has half of those coefficients.
    With an erf the instructions would take longer than the memory, and tails would be lost.
    """
    # Bounded, since Newton's step makes NaN of infinity; the bell is 0 long before.
    divisor = fma(tl.minimum(tl.abs(x), 1e4), 0.21213203435596423, 1.0)
    root = tl.rsqrt(divisor)
    t = root * root  # two instructions, where a division takes six
    # A step of Newton's: a GPU's reciprocal square root lacks the last bits.
    t = fma(t, fma(divisor, negative(t), 1.0), t)
    polynomial = fma(t, -0.06471669636713273, 0.24254655607938355)
    polynomial = fma(polynomial, t, -0.25560975723768165)
    polynomial = fma(polynomial, t, 0.2731935140802825)
    polynomial = fma(polynomial, t, -0.046812800859062365)
    polynomial = fma(polynomial, t, 0.10721690024473701)
    polynomial = fma(polynomial, t, 0.07424154527765717)
    polynomial = fma(polynomial, t, 0.08534591859534221)
    polynomial = fma(polynomial, t, 0.08459481047382042)
    bell = tl.exp2(x * x * (-0.5 * LOG2_E))
    tail = polynomial * (t * bell)
    return tl.where(x < 0.0, tail, 1.0 - tail), bell


@triton.jit
def activation_and_derivative(x, ACTIVATION: tl.constexpr):
    """Compute ``activation(x)`` and ``activation'(x)`` in float32."""
    if ACTIVATION == _RELU:
        # A NaN stays one, as in torch.
        y = tl.where(x < 0.0, 0.0, x)
        d = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == _GELU:
        cumulative, bell = _normal(x)
        y = x * cumulative
        d = fma(x, bell * _INV_SQRT_2PI, cumulative)
    elif ACTIVATION == _GELU_TANH:
        inner = _gelu_inner(x)
        s = _sigmoid(inner)
        y = x * s  # 0.5 * (1 + tanh(u)) is sigmoid(2 u)
        slope = fma(x * x, 6.0 * _GELU_CUBIC * _SQRT_2_OVER_PI, 2.0 * _SQRT_2_OVER_PI)
        # sigmoid(-u) in place of 1 - sigmoid(u), which cancels.
        d = fma(x * s, _sigmoid(-inner) * slope, s)
    else:
        steeper = x if ACTIVATION == _SILU else x * _QUICK
        s = _sigmoid(steeper)
        y = x * s
        d = fma(steeper * s, _sigmoid(-steeper), s)
    return y, d


@triton.jit(do_not_specialize=COUNTS)
def _bias_activation_forward(
    x_ptr, bias_ptr, seed_ptr, y_ptr, p, n_rows, n_columns, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):
    column_blocks = tl.cdiv(n_columns, BLOCK_N)
    first_column = (tl.program_id(0) % column_blocks) * BLOCK_N
    rows = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    valid = (rows < n_rows)[:, None] & in_row[None, :]
    x = tl.load(x_ptr + (rows * stride_x)[:, None] + columns[None, :], mask=valid, other=0.0)
    x = x.to(tl.float32)  # [BLOCK_M, BLOCK_N]
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
    y, _ = activation_and_derivative(x, ACTIVATION)
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), 0, rows, first_column, p, BLOCK_N)
        y = tl.where(keep, y * dropout_scale(p), 0.0)
    store(y_ptr + (rows * n_columns)[:, None] + columns[None, :], y, valid)


@triton.jit(do_not_specialize=COUNTS)
def _bias_activation_backward(
    dy_ptr, x_ptr, bias_ptr, seed_ptr, dx_ptr, partials_ptr, p, n_rows, n_columns, stride_dy,
    stride_x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):
    let_next_begin(OVERLAPS)
    first_column = tl.program_id(1) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < n_columns
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in tl.range(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES
    ):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        valid = (rows < n_rows)[:, None] & in_row[None, :]
        x_offsets = (rows * stride_x)[:, None] + columns[None, :]
        x = tl.load(x_ptr + x_offsets, mask=valid, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias[None, :]
        dy_offsets = (rows * stride_dy)[:, None] + columns[None, :]
        dy = tl.load(dy_ptr + dy_offsets, mask=valid, other=0.0).to(tl.float32)
        _, derivative = activation_and_derivative(x, ACTIVATION)
        dx = dy * derivative  # [BLOCK_M, BLOCK_N]
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), 0, rows, first_column, p, BLOCK_N)
            dx = tl.where(keep, dx * dropout_scale(p), 0.0)
        store(dx_ptr + (rows * n_columns)[:, None] + columns[None, :], dx, valid)
        if NEEDS_BIAS:
            dbias += dx  # 0 in rows that there are not, as dy is
    if NEEDS_BIAS:
        row = tl.program_id(0).to(tl.int64) * n_columns
        tl.store(partials_ptr + row + columns, column_sums(dbias), mask=in_row)


@planned
def bias_activation_forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    activation: str,
) -> torch.Tensor:
    """Compute ``dropout(activation(x + bias))``, contiguous, in the dtype of ``x``."""
    y = contiguous_like(x)
    if y.numel() == 0:
        return y
    n_columns = x.shape[-1]
    x_rows = rows_of(x, n_columns)
    n_rows = x_rows.shape[0]
    bias = contiguous_vector(bias, n_columns)
    config = configs.elementwise_tile("activation_forward", n_columns, targets.target_of(x.device))
    blocks = targets.ceil_div(n_rows, config.block_m) * targets.ceil_div(n_columns, config.block_n)
    launch(
        _bias_activation_forward, (blocks,), config,
        x_rows, bias, seed, y, p, n_rows, n_columns, x_rows.stride(0),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, ACTIVATION=ACTIVATIONS[activation],
        HAS_BIAS=bias is not None, DROPOUT=seed is not None,
    )
    return y


@planned
def bias_activation_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    activation: str,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute (dx, dbias in the dtype of ``bias`` if needed) from the output's gradient."""
    dx = contiguous_like(x)
    wants_bias = needs_bias and bias is not None
    if dx.numel() == 0:
        return dx, torch.zeros_like(bias) if needs_bias and bias is not None else None
    n_columns = x.shape[-1]
    x_rows, dy_rows = rows_of(x, n_columns), rows_of(dy, n_columns)
    bias = contiguous_vector(bias)
    n_rows = x_rows.shape[0]
    target = targets.target_of(x.device)
    config = configs.column_tile(
        "activation_backward", n_columns, 12 if seed is None else 8, target
    )
    column_blocks = targets.ceil_div(n_columns, config.block_n)
    programs = configs.column_programs(n_rows, column_blocks, config, target)
    overlaps = target.overlaps and wants_bias
    shape = (programs if wants_bias else 0, n_columns)
    partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    launch(
        _bias_activation_backward, (programs, column_blocks), config,
        dy_rows, x_rows, bias, seed, dx, partials, p, n_rows, n_columns, dy_rows.stride(0),
        x_rows.stride(0), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        ACTIVATION=ACTIVATIONS[activation], HAS_BIAS=bias is not None, DROPOUT=seed is not None,
        NEEDS_BIAS=wants_bias, STAGES=config.num_stages, OVERLAPS=overlaps,
    )
    dbias = None
    if needs_bias and bias is not None:
        dbias = sum_partials(partials, bias.dtype, overlaps)
    return dx, dbias
