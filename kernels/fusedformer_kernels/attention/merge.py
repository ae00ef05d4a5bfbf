"""Merge attention over parts of the keys, by the log-sum-exp of each part.

    lse = log(sum_i exp(lse_i));  o = sum_i exp(lse_i - lse) o_i

One program merges BLOCK_M rows, the parts in their order: the same bits every time. Reads every
part once and writes the result. Backward: with w_i = exp(lse_i - lse),

    do_i = w_i do;  dlse_i = w_i (dlse + rowsum(do * (o_i - o)))

Source: Milakov and Gimelshein, arXiv:1805.02867; Liu et al., Ring Attention, arXiv:2310.01889.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.scores import (
    log_sum_exp,
    power,
    sink_of,
    store_row_statistics,
    with_sink,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import COUNTS, fma, row_offsets, store
from fusedformer_kernels.runtime.strided import collapsed


@triton.jit
def _shifted(lse, top):
    """Compute exp(lse - top), 0 where nothing is visible on either side."""
    return tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def _logarithm(top, total):
    seen = total != 0.0
    return tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), float("-inf"))


@triton.jit(do_not_specialize=COUNTS)
def _merge_splits(
    parts_ptr, statistics_parts_ptr, o_ptr, lse_ptr, statistics_ptr, sinks_ptr, splits, n_rows,
    heads, length, part_stride, plane, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, SCALED: tl.constexpr,
):
    """Merge rows, numbered as they lie in memory, [batch, length, heads]; lse is [batch, heads, L].

    ``statistics_parts`` [splits, 2, batch, heads, L] are the top and the sum of each part.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = rows < n_rows
    dims = tl.arange(0, BLOCK_DV)
    valid = row_valid[:, None] & (dims < VALUE_DIM)[None, :]
    head = rows % heads
    position = rows // heads % length
    lse_rows = (rows // (heads * length) * heads + head) * length + position
    offsets = rows[:, None] * VALUE_DIM + dims[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for part in range(0, splits):
        index = tl.cast(part, tl.int64)
        own = statistics_parts_ptr + index * 2 * plane + lse_rows
        own_top = tl.load(own, mask=row_valid, other=float("-inf"))
        own_total = tl.load(own + plane, mask=row_valid, other=0.0)
        o = tl.load(parts_ptr + index * part_stride + offsets, mask=valid, other=0.0)
        new_top = tl.maximum(top, own_top)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = power(top - finite, SCALED)
        weight = power(own_top - finite, SCALED) * own_total
        acc = fma(acc, rescale[:, None], o * weight[:, None])
        total = fma(total, rescale, weight)
        top = new_top
    if sinks_ptr is not None:
        top, total, rescale = with_sink(top, total, sink_of(sinks_ptr + head, SCALED), SCALED)
        acc *= rescale[:, None]
    store(o_ptr + offsets, acc / tl.where(total == 0.0, 1.0, total)[:, None], valid)
    store_row_statistics(statistics_ptr, plane, lse_rows, row_valid, top, total)
    if lse_ptr is not None:
        tl.store(lse_ptr + lse_rows, log_sum_exp(top, total, SCALED), mask=row_valid)


def merge_splits(
    parts: torch.Tensor,
    statistics_parts: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    statistics: torch.Tensor,
    sinks: torch.Tensor | None,
    scaled: bool,
) -> None:
    """Fill ``output`` [B, H, L, Ev], ``lse`` [B, H, L] and ``statistics`` [2, B, H, L].

    From float32 parts [splits, ...]; each of the output lies in memory as ``output`` does, [B, L,
    H, Ev]; those of the statistics are tops, in units that ``scaled`` tells, and sums. The parts
    are without sinks ``[H]``, which join here.
    """
    batch, heads, length, dim = output.shape
    rows = batch * heads * length
    block = 16
    launch(
        _merge_splits, (targets.ceil_div(rows, block),), targets.LaunchConfig(4, 2), parts,
        statistics_parts, output, lse, statistics, sinks, parts.shape[0], rows, heads, length,
        parts.stride(0), rows, VALUE_DIM=dim, BLOCK_DV=configs.padded_dim(dim), BLOCK_M=block,
        SCALED=scaled,
    )


@triton.jit(do_not_specialize=COUNTS)
def _merge_states(
    o1_ptr, lse1_ptr, o2_ptr, lse2_ptr, o_ptr, lse_ptr, n_rows, size_1, size_2, o1_strides,
    lse1_strides, o2_strides, lse2_strides, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write the merged output [n_rows, DIM] and log-sum-exp [n_rows], contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = rows < n_rows
    dims = tl.arange(0, BLOCK_D)
    valid = row_valid[:, None] & (dims < DIM)[None, :]
    o1, lse1 = _load_state(
        o1_ptr, lse1_ptr, o1_strides, lse1_strides, rows, row_valid, dims, valid, size_1, size_2
    )
    o2, lse2 = _load_state(
        o2_ptr, lse2_ptr, o2_strides, lse2_strides, rows, row_valid, dims, valid, size_1, size_2
    )
    top = tl.maximum(lse1, lse2)
    weight1, weight2 = _shifted(lse1, top), _shifted(lse2, top)
    total = weight1 + weight2
    o = o1 * weight1[:, None] + o2 * weight2[:, None]
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]
    store(o_ptr + rows[:, None] * DIM + dims[None, :], o, valid)
    tl.store(lse_ptr + rows, _logarithm(top, total), mask=row_valid)


@triton.jit
def _load_state(
    o_ptr, lse_ptr, o_strides, lse_strides, rows, row_valid, dims, valid, size_1, size_2
):
    """Load float32 (output [BLOCK_M, BLOCK_D], log-sum-exp [BLOCK_M]) of strided rows."""
    offsets = row_offsets(rows, size_1, size_2, o_strides[0], o_strides[1], o_strides[2])
    offsets = offsets[:, None] + (dims * tl.cast(o_strides[3], tl.int64))[None, :]
    o = tl.load(o_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    offsets = row_offsets(rows, size_1, size_2, lse_strides[0], lse_strides[1], lse_strides[2])
    return o, tl.load(lse_ptr + offsets, mask=row_valid, other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def _merge_states_backward(
    grad_ptr, lse_grad_ptr, o1_ptr, lse1_ptr, o2_ptr, lse2_ptr, do1_ptr, dlse1_ptr, do2_ptr,
    dlse2_ptr, n_rows, size_1, size_2, grad_strides, lse_grad_strides, o1_strides, lse1_strides,
    o2_strides, lse2_strides, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = rows < n_rows
    dims = tl.arange(0, BLOCK_D)
    valid = row_valid[:, None] & (dims < DIM)[None, :]
    grad, lse_grad = _load_state(
        grad_ptr, lse_grad_ptr, grad_strides, lse_grad_strides, rows, row_valid, dims, valid,
        size_1, size_2,
    )
    o1, lse1 = _load_state(
        o1_ptr, lse1_ptr, o1_strides, lse1_strides, rows, row_valid, dims, valid, size_1, size_2
    )
    o2, lse2 = _load_state(
        o2_ptr, lse2_ptr, o2_strides, lse2_strides, rows, row_valid, dims, valid, size_1, size_2
    )
    top = tl.maximum(lse1, lse2)
    weight1, weight2 = _shifted(lse1, top), _shifted(lse2, top)
    total = weight1 + weight2
    total = tl.where(total == 0.0, 1.0, total)
    weight1, weight2 = weight1 / total, weight2 / total
    # do * (o_1 - o) = w_2 do * (o_1 - o_2), and the other way round.
    apart = tl.sum(grad * (o1 - o2), 1)
    offsets = rows[:, None] * DIM + dims[None, :]
    store(do1_ptr + offsets, grad * weight1[:, None], valid)
    store(do2_ptr + offsets, grad * weight2[:, None], valid)
    tl.store(dlse1_ptr + rows, weight1 * (lse_grad + weight2 * apart), mask=row_valid)
    tl.store(dlse2_ptr + rows, weight2 * (lse_grad - weight1 * apart), mask=row_valid)


@planned
def merge_states(
    output1: torch.Tensor, lse1: torch.Tensor, output2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two states: (output [..., L, D], float32 log-sum-exp [..., L]), both contiguous."""
    output = torch.empty(output1.shape, dtype=output1.dtype, device=output1.device)
    lse = torch.empty(lse1.shape, dtype=torch.float32, device=lse1.device)
    if output.numel() == 0:
        return output, torch.logaddexp(lse1, lse2)
    states = _state_views((output1, lse1), (output2, lse2))
    sizes = _sizes(states[0])
    block = 16
    launch(
        _merge_states, (targets.ceil_div(lse.numel(), block),), targets.LaunchConfig(4, 2),
        *states, output, lse, *sizes, *(t.stride() for t in states), DIM=output.shape[-1],
        BLOCK_D=configs.padded_dim(output.shape[-1]), BLOCK_M=block,
    )
    return output, lse


@planned
def merge_states_backward(
    grad: torch.Tensor,
    lse_grad: torch.Tensor,
    output1: torch.Tensor,
    lse1: torch.Tensor,
    output2: torch.Tensor,
    lse2: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Compute gradients of (output1, lse1, output2, lse2), contiguous."""
    grads = tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (output1, lse1, output2, lse2)
    )
    if grad.numel() == 0:
        return tuple(g.zero_() for g in grads)
    states = _state_views((grad, lse_grad), (output1, lse1), (output2, lse2))
    block = 16
    launch(
        _merge_states_backward, (targets.ceil_div(lse1.numel(), block),),
        targets.LaunchConfig(4, 2), *states, *grads, *_sizes(states[0]),
        *(t.stride() for t in states), DIM=grad.shape[-1],
        BLOCK_D=configs.padded_dim(grad.shape[-1]), BLOCK_M=block,
    )
    return grads


def _state_views(*states: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """View outputs, and log-sum-exps broadcast along the last dimension of these, as 4-D."""
    pairs = ((output, lse[..., None].expand_as(output)) for output, lse in states)
    return collapsed([tensor for pair in pairs for tensor in pair])[0]


def _sizes(view: torch.Tensor) -> tuple[int, int, int]:
    """Find (rows, size_1, size_2), by which kernels number rows."""
    return view.shape[0] * view.shape[1] * view.shape[2], view.shape[1], view.shape[2]
