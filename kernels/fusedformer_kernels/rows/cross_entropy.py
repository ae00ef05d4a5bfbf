"""Compute cross entropy of rows of logits x with a class t each, and its gradient; class weights w.

    lse    = log(sum_c exp(x_c))                  kept as the largest logit and the log of the rest
    loss   = (1 - e) w_t (lse - x_t) + e / C sum_c w_c (lse - x_c)            e: label smoothing
    dx_c   = g (a exp(x_c - lse) - (1 - e) w_t [c = t] - e / C w_c),  a = (1 - e) w_t + e / C sum(w)

A row whose target is ``ignore_index`` has loss 0 and gradient 0; one whose target is no class has
loss NaN. One program computes BLOCK_M rows, tile by tile: an online pass for the log-sum-exp, and
if the gradient is to replace the logits a second, which finds them in the L2 cache. So logits are
read once and at most written once. The gradient alone, of known log-sum-exp, is a kernel with a
program a tile: it reads and writes each element once. Both also take a block of the classes; what
the first has seen of a row then waits for the next block in STATE numbers.

Rows of 50,257 logits are not aligned to 16 bytes, so that threads would load them one by one.
Where rows are apart by more than their columns, what lies between may be read and overwritten:
``n_readable`` is the number of columns with it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import (
    COUNTS,
    LN_2,
    LOG2_E,
    fma,
    negative,
    online_sum,
    row_numbers,
    row_offsets,
    store,
)
from fusedformer_kernels.runtime.strided import collapsed, contiguous, contiguous_vector

# Columns of a tile; a row of fewer shares its program with others.
TILE = 4096
# Of a row: largest logit, sum of exponentials, anchor, sum of w_c (x_c - anchor), target's logit.
STATE = 5


@triton.jit
def _load_targets(target_ptr, weight_ptr, rows, n_rows, n_classes, ignore_index,
                  WEIGHTED: tl.constexpr):
    """Load (target, whether the row counts, whether its target is a class, its weight), [M, 1]."""
    target = tl.load(target_ptr + rows, mask=rows < n_rows, other=ignore_index)[:, None]
    kept = target != ignore_index
    known = kept & (target >= 0) & (target < n_classes)
    weight = tl.where(known, 1.0, 0.0)
    if WEIGHTED:
        weight = tl.load(weight_ptr + target, mask=known, other=0.0).to(tl.float32)
    return target, kept, known, weight


@triton.jit
def _row_factors(factor_ptr, factor_stride, weight_total_ptr, rows, kept, known, weight, smoothing,
                 n_classes, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr):
    """Compute the factors of the probabilities, of the target's one and of the class weights.

    Each is [BLOCK_M, 1].
    """
    offsets = (rows * tl.cast(factor_stride, tl.int64))[:, None]
    factor = tl.load(factor_ptr + offsets, mask=known, other=0.0).to(tl.float32)
    factor = tl.where(kept & (known == 0), float("nan"), factor)
    at_target = (1.0 - smoothing) * weight * factor
    everywhere = tl.zeros_like(factor)
    total = at_target
    if SMOOTHED:
        everywhere = factor * (smoothing / n_classes)
        all_weights = tl.load(weight_total_ptr) if WEIGHTED else n_classes
        total = at_target + everywhere * all_weights
    return total, at_target, everywhere


@triton.jit
def _gradient(x, classes, in_row, target, top, log_total, total, at_target, everywhere, weight_ptr,
              WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr):
    """Compute the gradient [BLOCK_M, BLOCK_N] of logits of these ``classes`` [1, BLOCK_N]."""
    wanted = tl.where(classes == target.to(tl.int32), negative(at_target), 0.0)
    if SMOOTHED:
        if WEIGHTED:
            weights = tl.load(weight_ptr + classes, mask=in_row, other=0.0).to(tl.float32)
            wanted = fma(negative(everywhere), weights, wanted)
        else:
            wanted -= everywhere
    dx = fma(tl.exp2(((x - top) - log_total) * LOG2_E), total, wanted)
    return tl.where(total == 0.0, 0.0, dx)  # of an ignored row, which may hold anything


@triton.jit(do_not_specialize=COUNTS)
def _cross_entropy_rows(
    x_ptr, target_ptr, weight_ptr, weight_total_ptr, factor_ptr, state_ptr, losses_ptr,
    statistics_ptr, factor_stride, smoothing, ignore_index, n_rows, n_columns, n_readable,
    first_class, n_classes, size_1, size_2, stride_x0, stride_x1, stride_x2, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr,
    RESUMES: tl.constexpr, ENDS: tl.constexpr, GRADIENT: tl.constexpr,
):
    rows = row_numbers(n_rows, BLOCK_M)  # [BLOCK_M]
    columns = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]; compared in 32 bits: half the work
    row_valid = (rows < n_rows)[:, None]
    offsets = rows.to(tl.int64)[:, None]
    x_rows = x_ptr + row_offsets(rows, size_1, size_2, stride_x0, stride_x1, stride_x2)[:, None]
    target, kept, known, weight = _load_targets(
        target_ptr, weight_ptr, rows, n_rows, n_classes, ignore_index, WEIGHTED
    )
    if RESUMES:
        top = tl.load(state_ptr + offsets, mask=row_valid, other=0.0)
        total = tl.load(state_ptr + n_rows + offsets, mask=row_valid, other=1.0)
        anchor = tl.load(state_ptr + 2 * n_rows + offsets, mask=row_valid, other=0.0)
        linear = tl.load(state_ptr + 3 * n_rows + offsets, mask=row_valid, other=0.0)
        x_target = tl.load(state_ptr + 4 * n_rows + offsets, mask=row_valid, other=0.0)
    else:
        top = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M, 1], tl.float32)
        # Sums of differences keep their digits where all logits are large.
        anchor = tl.load(x_rows, mask=row_valid, other=0.0).to(tl.float32)
        anchor = tl.where(anchor == float("-inf"), 0.0, anchor)
        linear = tl.zeros([BLOCK_M, 1], tl.float32)
        x_target = tl.full([BLOCK_M, 1], float("nan"), tl.float32)
    # Read before anything is overwritten.
    place = target - first_class
    here = known & (place >= 0) & (place < n_columns)
    found = tl.load(x_rows + place * stride_x, mask=here, other=0.0).to(tl.float32)
    x_target = tl.where(here, found, x_target)
    for start in range(0, n_columns, BLOCK_N):
        tile = columns + start
        in_row = tile < n_columns
        readable = (tile < n_readable) & row_valid
        x = tl.load(x_rows + tile.to(tl.int64) * stride_x, mask=readable, other=float("-inf"))
        x = tl.where(in_row, x.to(tl.float32), float("-inf"))  # [BLOCK_M, BLOCK_N]
        top, total = online_sum(top, total, x)
        if SMOOTHED:
            shifted = x - anchor
            if WEIGHTED:
                weights = tl.load(weight_ptr + first_class + tile, mask=in_row, other=0.0)
                shifted *= weights.to(tl.float32)
            linear += tl.sum(tl.where(in_row & row_valid, shifted, 0.0), 1)[:, None]
    if not ENDS:
        store(state_ptr + offsets, top, row_valid)
        store(state_ptr + n_rows + offsets, total, row_valid)
        store(state_ptr + 2 * n_rows + offsets, anchor, row_valid)
        store(state_ptr + 3 * n_rows + offsets, linear, row_valid)
        store(state_ptr + 4 * n_rows + offsets, x_target, row_valid)
    else:
        top = tl.where(row_valid, top, 0.0)
        log_total = tl.log2(tl.where(row_valid, total, 1.0)) * LN_2
        loss = (1.0 - smoothing) * weight * (log_total - (x_target - top))
        if SMOOTHED:
            all_weights = tl.load(weight_total_ptr) if WEIGHTED else n_classes
            spread = log_total * all_weights - (linear + (anchor - top) * all_weights)
            loss += smoothing / n_classes * spread
        loss = tl.where(kept, loss, 0.0)
        store(losses_ptr + offsets, loss, row_valid)
        store(statistics_ptr + offsets, top, row_valid)
        store(statistics_ptr + n_rows + offsets, log_total, row_valid)
        if GRADIENT:
            of_all, at_target, everywhere = _row_factors(
                factor_ptr, factor_stride, weight_total_ptr, rows, kept, known, weight, smoothing,
                n_classes, WEIGHTED, SMOOTHED,
            )
            for start in range(0, n_columns, BLOCK_N):
                tile = columns + start
                in_row = tile < n_columns
                valid = (tile < n_readable) & row_valid
                x = tl.load(x_rows + tile.to(tl.int64) * stride_x, mask=valid, other=0.0)
                x = tl.where(in_row, x.to(tl.float32), 0.0)
                dx = _gradient(
                    x, tile, in_row, target, top, log_total, of_all, at_target, everywhere,
                    weight_ptr, WEIGHTED, SMOOTHED,
                )  # [BLOCK_M, BLOCK_N]
                store(x_rows + tile.to(tl.int64) * stride_x, dx, valid)


@triton.jit(do_not_specialize=COUNTS)
def _cross_entropy_gradient(
    x_ptr, target_ptr, weight_ptr, weight_total_ptr, factor_ptr, statistics_ptr, dx_ptr,
    factor_stride, smoothing, ignore_index, n_rows, n_columns, n_readable, first_class, n_classes,
    size_1, size_2, stride_x0, stride_x1, stride_x2, stride_x, stride_dx,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr,
):
    blocks = tl.cdiv(n_columns, BLOCK_N)
    # int64 where ``n_rows`` is, since that division is slow.
    first_row = ((tl.program_id(0) + n_rows * 0) // blocks) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    row_valid = (rows < n_rows)[:, None]
    in_row = columns < n_columns
    target, kept, known, weight = _load_targets(
        target_ptr, weight_ptr, rows, n_rows, n_classes, ignore_index, WEIGHTED
    )
    of_all, at_target, everywhere = _row_factors(
        factor_ptr, factor_stride, weight_total_ptr, rows, kept, known, weight, smoothing,
        n_classes, WEIGHTED, SMOOTHED,
    )
    offsets = rows.to(tl.int64)[:, None]
    top = tl.load(statistics_ptr + offsets, mask=row_valid, other=0.0)
    log_total = tl.load(statistics_ptr + n_rows + offsets, mask=row_valid, other=0.0)
    x_rows = x_ptr + row_offsets(rows, size_1, size_2, stride_x0, stride_x1, stride_x2)[:, None]
    valid = (columns < n_readable) & row_valid
    x = tl.load(x_rows + columns.to(tl.int64) * stride_x, mask=valid, other=0.0)
    x = tl.where(in_row, x.to(tl.float32), 0.0)
    dx = _gradient(
        x, columns + first_class, in_row, target, top, log_total, of_all, at_target, everywhere,
        weight_ptr, WEIGHTED, SMOOTHED,
    )  # [BLOCK_M, BLOCK_N]
    store(dx_ptr + offsets * stride_dx + columns, dx, valid)


@planned
def cross_entropy_rows(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    weight_total: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    factor: torch.Tensor | None = None,
    *,
    first_class: int = 0,
    n_classes: int | None = None,
    state: torch.Tensor | None = None,
    padded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute float32 (losses ``[N]``, statistics ``[2, N]``) of the rows of ``x`` ``[..., c]``.

    Args:
        x: any strides; the gradient replaces it if ``factor`` is given, then ``[N, C]``.
        target: int64 ``[N]``.
        weight, weight_total: ``[C]``, and its sum in float32, or None.
        ignore_index, label_smoothing: see above.
        factor: of the gradient: float32, of each row ``[N]`` or of all of them ``[]``.
        first_class, n_classes: the block of classes that ``x`` holds, all of them unless given. To
            be called with all blocks in order; only the last writes the result.
        state: float32 ``[STATE, N]``, for what goes from block to block.
        padded: whether ``x`` are rows and columns of :func:`padded_rows`.
    """
    n_rows, n_columns = target.shape[0], x.shape[-1]
    n_classes = n_columns if n_classes is None else n_classes
    ends = first_class + n_columns == n_classes
    losses = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    statistics = torch.empty((2, n_rows), dtype=torch.float32, device=x.device)
    if n_rows:
        (view,), _ = collapsed([x])
        target, weight = contiguous_vector(target), contiguous_vector(weight)
        config = _tile(n_columns, x.device)
        launch(
            _cross_entropy_rows, (targets.ceil_div(n_rows, config.block_m),), config,
            view, target, weight, weight_total, factor, state, losses, statistics,
            _row_stride(factor), label_smoothing, ignore_index, n_rows, n_columns,
            _padded(n_columns, x) if padded else n_columns, first_class, n_classes, view.shape[1],
            view.shape[2], *view.stride(),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, WEIGHTED=weight is not None,
            SMOOTHED=label_smoothing > 0.0, RESUMES=first_class > 0, ENDS=ends,
            GRADIENT=factor is not None,
        )
    return losses, statistics


@planned
def cross_entropy_gradient(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    weight_total: torch.Tensor | None,
    statistics: torch.Tensor,
    factor: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    *,
    first_class: int,
    n_classes: int,
    in_place: bool = False,
) -> torch.Tensor:
    """Compute the gradient of logits ``x`` ``[..., c]`` of classes from ``first_class`` on.

    ``statistics`` are those of :func:`cross_entropy_rows`, as are the other arguments. With
    ``in_place`` it replaces ``x``, rows and columns of :func:`padded_rows`.
    """
    dx = x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n_rows, n_columns = target.shape[0], x.shape[-1]
    if not n_rows:
        return dx
    (view,), _ = collapsed([x])
    target, weight = contiguous_vector(target), contiguous_vector(weight)
    statistics = contiguous(statistics)
    config = _tile(n_columns, x.device)
    blocks = targets.ceil_div(n_rows, config.block_m)
    blocks *= targets.ceil_div(n_columns, config.block_n)
    launch(
        _cross_entropy_gradient, (blocks,), config,
        view, target, weight, weight_total, factor, statistics, dx, _row_stride(factor),
        label_smoothing, ignore_index, n_rows, n_columns,
        _padded(n_columns, x) if in_place else n_columns, first_class, n_classes,
        view.shape[1], view.shape[2], *view.stride(), dx.stride(0) if in_place else n_columns,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, WEIGHTED=weight is not None,
        SMOOTHED=label_smoothing > 0.0,
    )
    return dx


def _row_stride(factor: torch.Tensor | None) -> int:
    """Find the stride between the factors of neighbouring rows: 0 if there is one for all."""
    return 0 if factor is None or factor.dim() == 0 else factor.stride(0)


def padded_rows(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Allocate logits ``[rows, columns]`` whose rows begin at multiples of 128 bytes."""
    width = _padded(columns, like)
    return torch.empty((rows, width), dtype=like.dtype, device=like.device)[:, :columns]


def _padded(columns: int, x: torch.Tensor) -> int:
    line = 128 // x.element_size()
    return targets.ceil_div(columns, line) * line


def _tile(columns: int, device: torch.device) -> targets.TileConfig:
    return configs.row_tile("cross_entropy", columns, TILE, TILE, 16, targets.target_of(device))
