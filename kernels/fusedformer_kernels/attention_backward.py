"""Scaled dot-product attention, backward: gradients of query, key, value.

    p = exp(s - lse);  dv = dropout(p)^T do;  dp = dropout'(do v^T);  delta = rowsum(do * o) - dlse
    ds = p * (dp - delta);  dq = scale * ds k;  dk = scale * ds^T q

Three kernels, none with atomics, so the same inputs give the same bits. One computes delta per
query. One owns a block of keys (of all query heads that share it) and walks the queries: dk, dv.
One owns a block of queries and walks the keys: dq. Scores are recomputed from q, k and lse, seven
products in all. Source: Dao, FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels import configs
from fusedformer_kernels.attention_mask_gradient import attention_mask_gradient
from fusedformer_kernels.attention_tiles import (
    attention_arguments,
    load_row_terms,
    load_tile,
    mask_scores,
    score_gradients,
)
from fusedformer_kernels.launch import launch
from fusedformer_kernels.primitives import (
    LOG2_E,
    cast,
    dot,
    dropout_keep,
    dropout_scale,
    store,
)


@triton.jit
def _attention_delta(
    grad_ptr, o_ptr, lse_grad_ptr, delta_ptr, n_heads, n_queries, stride_gb, stride_gh, stride_gm,
    stride_gd, stride_ob, stride_oh, stride_om, stride_od, stride_lb, stride_lh, stride_lm,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_LSE_GRAD: tl.constexpr,
):
    """delta [BLOCK_M] = rowsum(do * o) - dlse, the term that every score's gradient shares."""
    blocks = tl.cdiv(n_queries, BLOCK_M)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = plane // n_heads, plane % n_heads
    first_row = (tl.program_id(0) % blocks) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_valid = rows < n_queries
    grad = load_tile(
        grad_ptr + batch * stride_gb + head * stride_gh, first_row, n_queries, stride_gm,
        stride_gd, BLOCK_M, VALUE_DIM, BLOCK_DV, False,
    )  # [BLOCK_M, BLOCK_DV]
    o = load_tile(
        o_ptr + batch * stride_ob + head * stride_oh, first_row, n_queries, stride_om, stride_od,
        BLOCK_M, VALUE_DIM, BLOCK_DV, False,
    )  # [BLOCK_M, BLOCK_DV]
    delta = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_LSE_GRAD:
        offsets = batch * stride_lb + head * stride_lh + rows.to(tl.int64) * stride_lm
        delta -= tl.load(lse_grad_ptr + offsets, mask=row_valid, other=0.0)
    tl.store(delta_ptr + plane * n_queries + rows, delta, mask=row_valid)


@triton.jit
def _walk_queries(
    k, v, dk, dv, q_base, grad_base, lse_ptr, delta_ptr, mask_base, key_mask_base, seed_ptr,
    first, last, columns, first_column, n_queries, n_keys, plane, scale, exp_scale, p, stride_qm,
    stride_qd, stride_gm, stride_gd, stride_mask_row, stride_mask_column, stride_key_mask,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr, PIPELINED: tl.constexpr,
):
    """Add to dk, dv what the queries in [first, last) give; tiles are [keys, queries]."""
    # As in the forward: one pipelined loop a kernel.
    for start in tl.range(first, last, BLOCK_M, num_stages=None if PIPELINED else 1):
        rows = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        q = load_tile(
            q_base, start, n_queries, stride_qm, stride_qd, BLOCK_M, HEAD_DIM, BLOCK_D, False
        )  # [BLOCK_M, BLOCK_D]
        grad = load_tile(
            grad_base, start, n_queries, stride_gm, stride_gd, BLOCK_M, VALUE_DIM, BLOCK_DV, False
        )  # [BLOCK_M, BLOCK_DV]
        lse, delta = load_row_terms(lse_ptr, delta_ptr, rows, n_queries)
        zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        scores = dot(k, tl.trans(q), zeros, PRECISION)  # [BLOCK_N, BLOCK_M]
        scores = mask_scores(
            scores, rows[None, :], columns[:, None], n_queries, n_keys, scale, mask_base,
            key_mask_base, stride_mask_row, stride_mask_column, stride_key_mask, MASK,
            HAS_KEY_MASK, CAUSAL, HAS_LENGTHS, SCALED,
        )
        weights = tl.exp2(scores * exp_scale - lse[None, :])  # [BLOCK_N, BLOCK_M]
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), plane, rows, first_column, p, BLOCK_N)
            keep = tl.trans(keep)
        if NEEDS_V:
            dropped = weights
            if DROPOUT:
                dropped = tl.where(keep, weights * dropout_scale(p), 0.0)
            dv = dot(cast(dropped, grad.dtype), grad, dv, PRECISION)
        if NEEDS_K:
            dweights = dot(v, tl.trans(grad), zeros, PRECISION)  # [BLOCK_N, BLOCK_M]
            if DROPOUT:
                dweights = tl.where(keep, dweights * dropout_scale(p), 0.0)
            dscores = weights * (dweights - delta[None, :])
            dk = dot(cast(dscores, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def _attention_backward_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, mask_ptr, key_mask_ptr, key_lengths_ptr,
    seed_ptr, dk_ptr, dv_ptr, scale, p, n_heads, group, n_queries, n_keys,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_mask_b, stride_mask_h, stride_mask_row, stride_mask_column, stride_key_mask_b,
    stride_key_mask, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr, ONE_LOOP: tl.constexpr,
):
    blocks = tl.cdiv(n_keys, BLOCK_N)
    first_column = (tl.program_id(0) % blocks) * BLOCK_N
    plane = tl.program_id(0) // blocks
    n_key_heads = n_heads // group
    batch = (plane // n_key_heads).to(tl.int64)
    key_head = (plane % n_key_heads).to(tl.int64)
    columns = first_column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    visible_keys = n_keys
    if HAS_LENGTHS:
        visible_keys = tl.minimum(n_keys, tl.load(key_lengths_ptr + batch).to(tl.int32))
    k = load_tile(
        k_ptr + batch * stride_kb + key_head * stride_kh, first_column, visible_keys,
        stride_kn, stride_kd, BLOCK_N, HEAD_DIM, BLOCK_D, False,
    )  # [BLOCK_N, BLOCK_D]
    v = load_tile(
        v_ptr + batch * stride_vb + key_head * stride_vh, first_column, visible_keys,
        stride_vn, stride_vd, BLOCK_N, VALUE_DIM, BLOCK_DV, False,
    )  # [BLOCK_N, BLOCK_DV]
    key_mask_base = key_mask_ptr
    if HAS_KEY_MASK:
        key_mask_base += batch * stride_key_mask_b
    exp_scale = scale * LOG2_E
    if SCALED:
        exp_scale = 1.0
    first = 0
    full = 0
    last = n_queries
    if IS_CAUSAL:
        # Queries before the first key see none of this block; from `full` on they see all of it.
        first = first_column // BLOCK_M * BLOCK_M
        full = tl.minimum(tl.cdiv(first_column + BLOCK_N - 1, BLOCK_M) * BLOCK_M, n_queries)
        if ONE_LOOP:
            full = first
    if HAS_LENGTHS:
        last = tl.where(first_column < visible_keys, last, 0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        head_plane = batch * n_heads + head
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        grad_base = grad_ptr + batch * stride_gb + head * stride_gh
        lse_base = lse_ptr + head_plane * n_queries
        delta_base = delta_ptr + head_plane * n_queries
        mask_base = mask_ptr
        if MASK != 0:
            mask_base += batch * stride_mask_b + head * stride_mask_h
        if IS_CAUSAL and not ONE_LOOP:
            dk, dv = _walk_queries(
                k, v, dk, dv, q_base, grad_base, lse_base, delta_base, mask_base, key_mask_base,
                seed_ptr, first, tl.minimum(full, last), columns, first_column, n_queries,
                visible_keys, head_plane.to(tl.int32), scale, exp_scale, p, stride_qm, stride_qd,
                stride_gm, stride_gd, stride_mask_row, stride_mask_column, stride_key_mask,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK, HAS_KEY_MASK,
                HAS_LENGTHS, True, DROPOUT, SCALED, PRECISION, NEEDS_K, NEEDS_V, False,
            )
        dk, dv = _walk_queries(
            k, v, dk, dv, q_base, grad_base, lse_base, delta_base, mask_base, key_mask_base,
            seed_ptr, full, last, columns, first_column, n_queries, visible_keys,
            head_plane.to(tl.int32), scale, exp_scale, p, stride_qm, stride_qd, stride_gm,
            stride_gd, stride_mask_row, stride_mask_column, stride_key_mask, HEAD_DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK, HAS_KEY_MASK, HAS_LENGTHS,
            IS_CAUSAL and ONE_LOOP, DROPOUT, SCALED, PRECISION, NEEDS_K, NEEDS_V, True,
        )
    valid = (columns < n_keys)[:, None]
    if NEEDS_K:
        dims = tl.arange(0, BLOCK_D)
        rows_k = dk_ptr + batch * stride_dkb + key_head * stride_dkh
        rows_k += columns.to(tl.int64) * stride_dkn
        store(rows_k[:, None] + dims[None, :], dk * scale, valid & (dims < HEAD_DIM)[None, :])
    if NEEDS_V:
        dims_v = tl.arange(0, BLOCK_DV)
        rows_v = dv_ptr + batch * stride_dvb + key_head * stride_dvh
        rows_v += columns.to(tl.int64) * stride_dvn
        store(rows_v[:, None] + dims_v[None, :], dv, valid & (dims_v < VALUE_DIM)[None, :])


@triton.jit
def _walk_keys(
    q, grad, dq, lse, delta, k_base, v_base, mask_base, key_mask_base, seed_ptr, first, last,
    rows, n_queries, n_keys, plane, scale, exp_scale, p, stride_kn, stride_kd, stride_vn,
    stride_vd, stride_mask_row, stride_mask_column, stride_key_mask, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PARTIAL: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, PIPELINED: tl.constexpr,
):
    """Add to dq what the keys in [first, last) give; PARTIAL tiles are checked against bounds."""
    # As in the forward: one pipelined loop a kernel.
    for start in tl.range(first, last, BLOCK_N, num_stages=None if PIPELINED else 1):
        columns = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        k = load_tile(
            k_base, start, n_keys, stride_kn, stride_kd, BLOCK_N, HEAD_DIM, BLOCK_D, not PARTIAL
        )  # [BLOCK_N, BLOCK_D]
        v = load_tile(
            v_base, start, n_keys, stride_vn, stride_vd, BLOCK_N, VALUE_DIM, BLOCK_DV, not PARTIAL
        )  # [BLOCK_N, BLOCK_DV]
        dscores = score_gradients(
            q, grad, k, v, lse, delta, rows, columns, start, n_queries, n_keys, plane, mask_base,
            key_mask_base, seed_ptr, scale, exp_scale, p, stride_mask_row, stride_mask_column,
            stride_key_mask, BLOCK_N, MASK, HAS_KEY_MASK, CAUSAL and PARTIAL, PARTIAL, DROPOUT,
            SCALED, PRECISION,
        )
        dq = dot(cast(dscores, k.dtype), k, dq, PRECISION)
    return dq


@triton.jit
def _attention_backward_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, mask_ptr, key_mask_ptr, key_lengths_ptr,
    seed_ptr, dq_ptr, scale, p, n_heads, group, n_queries, n_keys,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dqb, stride_dqh, stride_dqm,
    stride_mask_b, stride_mask_h, stride_mask_row, stride_mask_column, stride_key_mask_b,
    stride_key_mask, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, ONE_LOOP: tl.constexpr,
):
    blocks = tl.cdiv(n_queries, BLOCK_M)
    block = tl.program_id(0) % blocks
    if IS_CAUSAL:
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
    grad = load_tile(
        grad_ptr + batch * stride_gb + head * stride_gh, first_row, n_queries, stride_gm,
        stride_gd, BLOCK_M, VALUE_DIM, BLOCK_DV, False,
    )  # [BLOCK_M, BLOCK_DV]
    offset = plane.to(tl.int64) * n_queries
    lse, delta = load_row_terms(lse_ptr + offset, delta_ptr + offset, rows, n_queries)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = n_keys
    full = n_keys
    if IS_CAUSAL:
        last = tl.minimum(n_keys, first_row + BLOCK_M)
        full = tl.minimum(n_keys, first_row + 1)
    full = full // BLOCK_N * BLOCK_N
    if ONE_LOOP:
        full = 0
    else:
        dq = _walk_keys(
            q, grad, dq, lse, delta, k_base, v_base, mask_base, key_mask_base, seed_ptr, 0, full,
            rows, n_queries, n_keys, plane, scale, exp_scale, p, stride_kn, stride_kd, stride_vn,
            stride_vd, stride_mask_row, stride_mask_column, stride_key_mask, HEAD_DIM, VALUE_DIM,
            BLOCK_D, BLOCK_DV, BLOCK_N, MASK, HAS_KEY_MASK, False, IS_CAUSAL, DROPOUT, SCALED,
            PRECISION, True,
        )
    dq = _walk_keys(
        q, grad, dq, lse, delta, k_base, v_base, mask_base, key_mask_base, seed_ptr, full, last,
        rows, n_queries, n_keys, plane, scale, exp_scale, p, stride_kn, stride_kd, stride_vn,
        stride_vd, stride_mask_row, stride_mask_column, stride_key_mask, HEAD_DIM, VALUE_DIM,
        BLOCK_D, BLOCK_DV, BLOCK_N, MASK, HAS_KEY_MASK, True, IS_CAUSAL, DROPOUT, SCALED,
        PRECISION, ONE_LOOP,
    )
    dims = tl.arange(0, BLOCK_D)
    dq_rows = dq_ptr + batch * stride_dqb + head * stride_dqh + rows.to(tl.int64) * stride_dqm
    valid = (rows < n_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    store(dq_rows[:, None] + dims[None, :], dq * scale, valid)


def attention_backward(
    grad: torch.Tensor | None,
    lse_grad: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (query, key, value, mask), None where ``needs`` says False.

    ``grad`` and ``lse_grad`` are those of the output and of the log-sum-exp; either may be None.
    """
    needs_q, needs_k, needs_v, needs_mask = needs
    batch, heads, n_queries, _ = query.shape
    n_keys, key_heads = key.shape[2], key.shape[1]

    def empty_like(tensor: torch.Tensor) -> torch.Tensor:
        # [batch, length, heads, dim] in memory, as the projections before attention lie.
        sizes = (tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3])
        return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device).transpose(1, 2)

    dq = empty_like(query) if needs_q else None
    dk = empty_like(key) if needs_k else None
    dv = empty_like(value) if needs_v else None
    if lse.numel() == 0 or n_keys == 0:
        grads = [g if g is None else g.zero_() for g in (dq, dk, dv)]
        dmask = torch.zeros_like(mask) if mask is not None and needs_mask else None
        return *grads, dmask
    if grad is None:
        grad = torch.zeros_like(output)
    delta = torch.empty_like(lse)
    target = configs.target_of(query.device)
    arguments = attention_arguments(
        query, key, value, mask, key_mask, key_lengths, seed, is_causal, scale
    )
    constants = arguments.constants
    launch(
        _attention_delta, (configs.ceil_div(n_queries, 64) * batch * heads,),
        configs.LaunchConfig(4, 2), grad, output, lse_grad, delta, heads, n_queries,
        *grad.stride(), *output.stride(), *((0, 0, 0) if lse_grad is None else lse_grad.stride()),
        VALUE_DIM=value.shape[3], BLOCK_DV=constants["BLOCK_DV"], BLOCK_M=64,
        HAS_LSE_GRAD=lse_grad is not None,
    )
    config = configs.attention_backward_config(arguments.kind, target)
    tensors = (
        query, key, value, grad, lse, delta, arguments.mask, arguments.key_mask, key_lengths, seed,
    )  # fmt: skip
    sizes = (scale, p, heads, heads // key_heads, n_queries, n_keys)
    strides = (*query.stride(), *key.stride(), *value.stride(), *grad.stride())
    passes = [(needs_k, needs_v)]
    if config.split_keys:
        passes = [(needs_k, False), (False, needs_v)]
    for pass_k, pass_v in passes:
        if not (pass_k or pass_v):
            continue
        launch(
            _attention_backward_keys,
            (configs.ceil_div(n_keys, config.block_n) * batch * key_heads,), config,
            *tensors, dk, dv, *sizes, *strides,
            *((0, 0, 0) if dk is None else dk.stride()[:3]),
            *((0, 0, 0) if dv is None else dv.stride()[:3]),
            *arguments.mask_strides, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            NEEDS_K=pass_k, NEEDS_V=pass_v, ONE_LOOP=config.one_loop, **constants,
        )
    if dq is not None:
        # This kernel's loop runs over keys, so the wide side of the tile is that of the queries.
        block_m, block_n = config.block_n, config.block_m
        launch(
            _attention_backward_queries,
            (configs.ceil_div(n_queries, block_m) * batch * heads,), config,
            *tensors, dq, *sizes, *strides, *dq.stride()[:3],
            *arguments.mask_strides, BLOCK_M=block_m, BLOCK_N=block_n,
            ONE_LOOP=config.one_loop, **constants,
        )
    dmask = None
    if needs_mask and mask is not None:
        dmask = attention_mask_gradient(mask, tensors, sizes, strides, arguments, target)
    return dq, dk, dv, dmask
