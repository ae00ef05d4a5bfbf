"""Scaled dot-product attention, forward.

    s = scale * q k^T + mask;  p = softmax(s);  o = dropout(p) v;  lse = log(sum(exp(s)))

One program computes BLOCK_M queries of one head: it holds them in registers and walks the keys
in tiles of BLOCK_N with the online softmax, so that no [queries, keys] matrix is ever in memory.
Tiles that need no bounds or causal test run in a loop of their own, and causally invisible tiles
not at all. Reads q once and k, v once per block of queries; writes o and one float32 per query.
Source: Dao, FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels import configs
from fusedformer_kernels.attention_tiles import (
    attention_arguments,
    load_tile,
    mask_scores,
    online_softmax_update,
)
from fusedformer_kernels.launch import launch
from fusedformer_kernels.primitives import (
    LN_2,
    LOG2_E,
    cast,
    dot,
    dropout_keep,
    dropout_scale,
    store,
)


@triton.jit
def _attend(
    q, acc, top, total, k_base, v_base, mask_base, key_mask_base, seed_ptr, first, last, rows,
    n_queries, n_keys, plane, scale, exp_scale, p, stride_kn, stride_kd, stride_vn, stride_vd,
    stride_mask_row, stride_mask_column, stride_key_mask, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PARTIAL: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, PIPELINED: tl.constexpr,
):
    """Online softmax over the keys in [first, last); PARTIAL tiles are checked against bounds."""
    # With two pipelined loops in a kernel ptxas serializes the tensor cores.
    for start in tl.range(first, last, BLOCK_N, num_stages=None if PIPELINED else 1):
        columns = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        k = load_tile(
            k_base, start, n_keys, stride_kn, stride_kd, BLOCK_N, HEAD_DIM, BLOCK_D, not PARTIAL
        )  # [BLOCK_N, BLOCK_D]
        scores = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        scores = dot(q, tl.trans(k), scores, PRECISION)  # [BLOCK_M, BLOCK_N]
        scores = mask_scores(
            scores, rows[:, None], columns[None, :], n_queries, n_keys, scale, mask_base,
            key_mask_base, stride_mask_row, stride_mask_column, stride_key_mask, MASK,
            HAS_KEY_MASK, CAUSAL and PARTIAL, PARTIAL, SCALED,
        )
        weights, rescale, top, total = online_softmax_update(scores, top, total, exp_scale)
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), plane, rows, start, p, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        v = load_tile(
            v_base, start, n_keys, stride_vn, stride_vd, BLOCK_N, VALUE_DIM, BLOCK_DV, not PARTIAL
        )  # [BLOCK_N, BLOCK_DV]
        acc = dot(cast(weights, v.dtype), v, acc * rescale[:, None], PRECISION)
    return acc, top, total


@triton.jit
def _attention_forward(
    q_ptr, k_ptr, v_ptr, mask_ptr, key_mask_ptr, key_lengths_ptr, seed_ptr, o_ptr, lse_ptr,
    scale, p, n_heads, group, n_queries, n_keys,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_om,
    stride_mask_b, stride_mask_h, stride_mask_row, stride_mask_column, stride_key_mask_b,
    stride_key_mask, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, ONE_LOOP: tl.constexpr,
):
    blocks = tl.cdiv(n_queries, BLOCK_M)
    block = tl.program_id(0) % blocks
    if IS_CAUSAL:
        # Longest first: the last queries see the most keys.
        block = blocks - 1 - block
    plane = tl.program_id(0) // blocks
    batch = (plane // n_heads).to(tl.int64)
    head = (plane % n_heads).to(tl.int64)
    key_head = head // group
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh
    mask_base = mask_ptr
    if MASK != 0:
        mask_base += batch * stride_mask_b + head * stride_mask_h
    key_mask_base = key_mask_ptr
    if HAS_KEY_MASK:
        key_mask_base += batch * stride_key_mask_b
    if HAS_LENGTHS:
        n_keys = tl.minimum(n_keys, tl.load(key_lengths_ptr + batch).to(tl.int32))
    exp_scale = scale * LOG2_E
    if SCALED:
        exp_scale = 1.0

    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q = load_tile(
        q_ptr + batch * stride_qb + head * stride_qh, first_row, n_queries, stride_qm, stride_qd,
        BLOCK_M, HEAD_DIM, BLOCK_D, False,
    )  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    last = n_keys
    full = n_keys
    if IS_CAUSAL:
        last = tl.minimum(n_keys, first_row + BLOCK_M)
        full = tl.minimum(n_keys, first_row + 1)
    full = full // BLOCK_N * BLOCK_N
    if ONE_LOOP:
        full = 0
    else:
        acc, top, total = _attend(
            q, acc, top, total, k_base, v_base, mask_base, key_mask_base, seed_ptr, 0, full, rows,
            n_queries, n_keys, plane, scale, exp_scale, p, stride_kn, stride_kd, stride_vn,
            stride_vd, stride_mask_row, stride_mask_column, stride_key_mask, HEAD_DIM, VALUE_DIM,
            BLOCK_D, BLOCK_DV, BLOCK_N, MASK, HAS_KEY_MASK, False, IS_CAUSAL, DROPOUT, SCALED,
            PRECISION, True,
        )
    acc, top, total = _attend(
        q, acc, top, total, k_base, v_base, mask_base, key_mask_base, seed_ptr, full, last, rows,
        n_queries, n_keys, plane, scale, exp_scale, p, stride_kn, stride_kd, stride_vn, stride_vd,
        stride_mask_row, stride_mask_column, stride_key_mask, HEAD_DIM, VALUE_DIM, BLOCK_D,
        BLOCK_DV, BLOCK_N, MASK, HAS_KEY_MASK, True, IS_CAUSAL, DROPOUT, SCALED, PRECISION,
        ONE_LOOP,
    )
    # A query with no visible key: total 0, output 0, log-sum-exp -inf.
    visible = total != 0.0  # true for NaN, which stays one
    total = tl.where(visible, total, 1.0)
    o = acc / total[:, None]
    if DROPOUT:
        o *= dropout_scale(p)
    lse = tl.where(visible, (top * exp_scale + tl.log2(total)) * LN_2, float("-inf"))
    row_valid = rows < n_queries
    tl.store(lse_ptr + plane.to(tl.int64) * n_queries + rows, lse, mask=row_valid)
    dims = tl.arange(0, BLOCK_DV)
    o_rows = o_ptr + batch * stride_ob + head * stride_oh + rows.to(tl.int64) * stride_om
    store(o_rows[:, None] + dims[None, :], o, row_valid[:, None] & (dims < VALUE_DIM)[None, :])


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [B, H, L, Ev], log-sum-exp float32 [B, H, L]) of 4-D strided tensors.

    The output lies in memory as [B, L, H, Ev]. ``key`` and ``value`` may have fewer heads.
    """
    batch, heads, n_queries, _ = query.shape
    n_keys, value_dim = key.shape[2], value.shape[3]
    output = torch.empty(
        (batch, n_queries, heads, value_dim), dtype=query.dtype, device=query.device
    ).transpose(1, 2)
    lse = torch.empty((batch, heads, n_queries), dtype=torch.float32, device=query.device)
    if lse.numel() == 0:
        return output, lse
    arguments = attention_arguments(
        query, key, value, mask, key_mask, key_lengths, seed, is_causal, scale
    )
    constants = arguments.constants
    config = configs.attention_forward_config(arguments.kind, configs.target_of(query.device))
    launch(
        _attention_forward, (configs.ceil_div(n_queries, config.block_m) * batch * heads,), config,
        query, key, value, arguments.mask, arguments.key_mask, key_lengths, seed, output, lse,
        scale, p, heads, heads // key.shape[1], n_queries, n_keys, *query.stride(), *key.stride(),
        *value.stride(), *output.stride()[:3], *arguments.mask_strides,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, ONE_LOOP=config.one_loop, **constants,
    )
    return output, lse
