"""Device functions and launch arguments that the forward and backward attention kernels share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fusedformer_kernels import configs
from fusedformer_kernels.primitives import LOG2_E, dot, dropout_keep, dropout_scale

NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2


@triton.jit
def load_tile(
    base, first, n_rows, stride_row, stride_dim, BLOCK: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, IN_BOUNDS: tl.constexpr,
):
    """Rows [first, first + BLOCK) of a [sequence, head_dim] matrix, 0 outside: [BLOCK, BLOCK_D].

    The 64-bit arithmetic is a scalar and loop-invariant offsets: with it on every element of every
    tile, ptxas serializes the tensor cores.
    """
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    wide_stride = tl.cast(stride_row, tl.int64)
    offsets = (rows * wide_stride)[:, None] + (dims * tl.cast(stride_dim, tl.int64))[None, :]
    pointers = base + first * wide_stride + offsets
    if IN_BOUNDS and DIM == BLOCK_D:
        return tl.load(pointers)
    valid = (dims < DIM)[None, :]
    if not IN_BOUNDS:
        valid = valid & (rows < n_rows - first)[:, None]
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def mask_scores(
    scores, rows, columns, n_rows, n_columns, scale, mask_base, key_mask_base, stride_mask_row,
    stride_mask_column, stride_key_mask, MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, COLUMN_BOUNDS: tl.constexpr, SCALED: tl.constexpr,
):
    """Scores with masked elements at -inf, in base 2 if SCALED, else as they came.

    ``rows`` and ``columns`` are indices that broadcast to the shape of ``scores``, which may
    be [queries, keys] or its transpose.
    """
    if SCALED:
        scores = scores * (scale * LOG2_E)
    if MASK == 2:
        valid = (rows < n_rows) & (columns < n_columns)
        pointers = mask_base + rows.to(tl.int64) * stride_mask_row
        pointers += columns.to(tl.int64) * stride_mask_column
        scores += tl.load(pointers, mask=valid, other=0.0).to(tl.float32) * LOG2_E
    if MASK == 1:
        valid = (rows < n_rows) & (columns < n_columns)
        pointers = mask_base + rows.to(tl.int64) * stride_mask_row
        pointers += columns.to(tl.int64) * stride_mask_column
        scores = tl.where(tl.load(pointers, mask=valid, other=0) != 0, scores, float("-inf"))
    if HAS_KEY_MASK:
        pointers = key_mask_base + columns.to(tl.int64) * stride_key_mask
        keep = tl.load(pointers, mask=columns < n_columns, other=0)
        scores = tl.where(keep != 0, scores, float("-inf"))
    if COLUMN_BOUNDS:
        scores = tl.where(columns < n_columns, scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(columns <= rows, scores, float("-inf"))
    return scores


@triton.jit
def online_softmax_update(scores, top, total, exp_scale):
    """One step of the online softmax over a tile [BLOCK_M, BLOCK_N] in base 2.

    ``top`` and ``total`` [BLOCK_M] are the running maximum of raw scores and the running sum of
    ``exp2(exp_scale * (score - top))``. Returns (weights, rescaling of what was summed before,
    top, total). The scale enters in one fused multiply-add an element. Source: arXiv:1805.02867.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row with no visible key yet keeps -inf as its top, and is shifted by 0: no NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) * exp_scale
    weights = tl.exp2(scores * exp_scale - shift[:, None])
    rescale = tl.exp2(top * exp_scale - shift)
    return weights, rescale, new_top, total * rescale + tl.sum(weights, 1)


@triton.jit
def load_row_terms(lse_ptr, delta_ptr, rows, n_queries):
    """(base-2 lse, delta) of queries [BLOCK_M]; +inf where nothing is visible, so weights are 0."""
    row_valid = rows < n_queries
    lse = tl.load(lse_ptr + rows, mask=row_valid, other=float("-inf"))
    delta = tl.load(delta_ptr + rows, mask=row_valid, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), delta


@triton.jit
def score_gradients(
    q, grad, k, v, lse, delta, rows, columns, first_column, n_queries, n_keys, plane, mask_base,
    key_mask_base, seed_ptr, scale, exp_scale, p, stride_mask_row, stride_mask_column,
    stride_key_mask, BLOCK_N: tl.constexpr, MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, COLUMN_BOUNDS: tl.constexpr, DROPOUT: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):
    """ds, the gradient of the scaled and masked scores of one tile [BLOCK_M, BLOCK_N]."""
    zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    scores = dot(q, tl.trans(k), zeros, PRECISION)
    scores = mask_scores(
        scores, rows[:, None], columns[None, :], n_queries, n_keys, scale, mask_base,
        key_mask_base, stride_mask_row, stride_mask_column, stride_key_mask, MASK, HAS_KEY_MASK,
        CAUSAL, COLUMN_BOUNDS, SCALED,
    )
    weights = tl.exp2(scores * exp_scale - lse[:, None])
    dweights = dot(grad, tl.trans(v), zeros, PRECISION)
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), plane, rows, first_column, p, BLOCK_N)
        dweights = tl.where(keep, dweights * dropout_scale(p), 0.0)
    return weights * (dweights - delta[:, None])


@dataclass(frozen=True)
class AttentionArguments:
    """What all attention kernels are launched with, worked out once from the tensors."""

    mask: torch.Tensor | None
    key_mask: torch.Tensor | None
    mask_strides: tuple[int, ...]  # batch, head, row, column, then batch and column of key_mask
    kind: configs.AttentionKind
    constants: dict[str, Any]


def attention_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    seed: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> AttentionArguments:
    """Kernel arguments of one attention call on 4-D tensors; masks may have size-1 dimensions."""
    kind = NO_MASK
    strides = [0, 0, 0, 0]
    if mask is not None:
        kind = BOOLEAN if mask.dtype == torch.bool else ADDITIVE
        strides = [0 if size == 1 else s for size, s in zip(mask.shape, mask.stride(), strict=True)]
        mask = mask.view(torch.uint8) if kind == BOOLEAN else mask
    if key_mask is not None:
        strides += key_mask.stride()
        key_mask = key_mask.view(torch.uint8)
    else:
        strides += [0, 0]
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": configs.padded_dim(head_dim),
        "BLOCK_DV": configs.padded_dim(value_dim),
        "MASK": kind,
        "HAS_KEY_MASK": key_mask is not None,
        "HAS_LENGTHS": key_lengths is not None,
        "IS_CAUSAL": is_causal,
        "DROPOUT": seed is not None,
        # The scale can wait for the exponential where nothing is added and order is kept.
        "SCALED": kind == ADDITIVE or scale <= 0,
        "PRECISION": _dot_precision(query),
    }
    precision = constants["PRECISION"]
    attention_kind = configs.AttentionKind(
        dim=max(constants["BLOCK_D"], constants["BLOCK_DV"]),
        operands=precision if query.dtype == torch.float32 else "half",
        heavy=kind != NO_MASK or seed is not None,
        causal=is_causal,
    )
    return AttentionArguments(mask, key_mask, tuple(strides), attention_kind, constants)


def _dot_precision(tensor: torch.Tensor) -> str:
    """Precision of float32 products: torch's own setting for matrix products."""
    if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"
