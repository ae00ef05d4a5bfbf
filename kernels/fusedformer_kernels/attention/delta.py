"""Compute delta of attention's backward: rowsum(do * o) - dlse of each query.

One program owns BLOCK_M queries of one head. Reads do and o once, writes 4 bytes a query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import layout_of
from fusedformer_kernels.attention.tiles import load_strided_rows, load_tile, matrix_of
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS, dot


@triton.jit(do_not_specialize=COUNTS)
def _attention_delta(
    grad_ptr, o_ptr, lse_grad_ptr, delta_ptr, n_heads, n_rows, grad_layout, o_layout,
    lse_grad_strides, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write delta [BLOCK_M] = rowsum(do * o) - dlse, which all scores' gradients of a row share.

    In float32 it is the diagonal of a product, which adds in the order of do v^T: where a query is
    sure of one key, delta is exactly what that key's weight gets, and its score no gradient.
    """
    blocks = tl.cdiv(n_rows, BLOCK_M)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = plane // n_heads, plane % n_heads
    first_row = (tl.program_id(0) % blocks) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_valid = rows < n_rows
    grad = load_tile(
        matrix_of(grad_ptr, grad_layout, batch, head, 0), first_row, n_rows, grad_layout,
        BLOCK_M, VALUE_DIM, BLOCK_DV, False,
    )  # [BLOCK_M, BLOCK_DV]
    o = load_tile(
        matrix_of(o_ptr, o_layout, batch, head, 0), first_row, n_rows, o_layout, BLOCK_M,
        VALUE_DIM, BLOCK_DV, False,
    )  # [BLOCK_M, BLOCK_DV]
    if grad.dtype == tl.float32:
        zeros = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
        own = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
        delta = tl.sum(tl.where(own, dot(grad, tl.trans(o), zeros, PRECISION), 0.0), 1)
    else:
        delta = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    if lse_grad_ptr is not None:
        delta -= load_strided_rows(
            lse_grad_ptr, lse_grad_strides, batch, head, rows.to(tl.int64), row_valid
        )
    tl.store(delta_ptr + plane * n_rows + rows, delta, mask=row_valid)


def attention_delta(
    grad: torch.Tensor,
    output: torch.Tensor,
    lse_grad: torch.Tensor | None,
    statistics: torch.Tensor,
    precision: str,
) -> torch.Tensor:
    """Compute delta, float32 [B, H, L], of ``grad`` and ``output`` [B, H, L, Ev].

    ``precision`` is that of the products of the backward that reads it.
    """
    batch, heads, n_rows, value_dim = output.shape
    delta = torch.empty_like(statistics[0])
    if delta.numel():
        block = 16 if grad.dtype == torch.float32 else 64
        launch(
            _attention_delta, (targets.ceil_div(n_rows, block) * batch * heads,),
            targets.LaunchConfig(4, 2), grad, output, lse_grad, delta, heads, n_rows,
            layout_of(grad), layout_of(output),
            (0, 0, 0) if lse_grad is None else lse_grad.stride(),
            VALUE_DIM=value_dim, BLOCK_DV=configs.padded_dim(value_dim),
            BLOCK_M=block, PRECISION=precision,
        )
    return delta
