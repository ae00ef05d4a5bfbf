"""Rotate the heads of queries and keys by their positions, normed before or not.

    z = norm(x) of each head, or x; for each pair (z1, z2) of columns at frequency i
    y1 = z1 * cos[position, i] - z2 * sin[position, i]
    y2 = z2 * cos[position, i] + z1 * sin[position, i]

Columns behind the pairs pass as they are. Pairs are halves of the rotated columns, or neighbours.
One launch serves queries and keys: a program per [BLOCK_M, BLOCK_D] rows, each a head of a token,
read in place by their strides. The other column of each pair is loaded from the line that is in the
cache. The backward turns dy back, and goes through the norm; its programs walk the rows and keep
the gradients of the norms' weights in registers. Forward reads x, writes y; backward reads dy, and
x where there is a norm, and writes dx. Either may write over what it reads: no other program reads
these rows, and a barrier keeps the threads of one from storing before all have loaded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusedformer_kernels.rows import configs
from fusedformer_kernels.rows.reduction import row_mean, sum_partials
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.plans import planned
from fusedformer_kernels.runtime.primitives import COUNTS, store
from fusedformer_kernels.runtime.strided import contiguous, contiguous_vector

MAX_HEAD_DIM = 512
NORMS = {"none": 0, "rms": 1, "layer": 2}
_NONE, _RMS, _LAYER = map(tl.constexpr, NORMS.values())


class Heads(NamedTuple):
    """The heads of queries or keys, ``[batch, length, heads, dim]`` by strides, and their norm."""

    x: torch.Tensor
    weight: torch.Tensor | None  # [dim]
    bias: torch.Tensor | None
    stride_batch: int
    stride_token: int
    stride_head: int
    n_heads: int


class Angles(NamedTuple):
    """Tables of cosines and sines ``[batch or 1, positions, pairs]``, and who reads which row."""

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None  # [batch * length]; None for 0, 1, ... in each sequence
    stride_batch: int
    stride_row: int
    n_pairs: int


@triton.jit
def _places(rows, heads, n_rows, length):
    """Return (token, position in its sequence, batch, offset in x) of rows [BLOCK_M]."""
    token = tl.minimum(rows, n_rows - 1) // heads.n_heads
    position = token % length
    batch = token // length
    offset = batch * heads.stride_batch + position * heads.stride_token
    return token, position, batch, offset + (rows % heads.n_heads) * heads.stride_head


@triton.jit
def _write(ptr, values, read_offsets, rows, columns, inside, dim, IN_PLACE: tl.constexpr):
    """Store [BLOCK_M, BLOCK_D] rows one behind the other, or over what was read."""
    if IN_PLACE:
        tl.debug_barrier()  # another thread may still load a column that this one stores
        offsets = read_offsets
    else:
        offsets = rows * dim
    store(ptr + offsets[:, None] + columns[None, :], values, inside)


@triton.jit
def _angles(angles, token, position, batch, pairs, rotated):
    """Load (cos, sin) [BLOCK_M, BLOCK_D]; 1 and 0 where columns pass as they are."""
    if angles.positions is not None:
        position = tl.load(angles.positions + token).to(tl.int64)
    offsets = (batch * angles.stride_batch + position * angles.stride_row)[:, None] + pairs[None, :]
    cos = tl.load(angles.cos + offsets, mask=rotated[None, :], other=1.0).to(tl.float32)
    sin = tl.load(angles.sin + offsets, mask=rotated[None, :], other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _columns(n_pairs, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return (columns, the other of each pair, which pair, is it rotated, is it the second)."""
    columns = tl.arange(0, BLOCK_D)
    rotated = columns < 2 * n_pairs
    if INTERLEAVED:
        second = columns % 2 == 1
        pairs = columns // 2
        others = tl.where(second, columns - 1, columns + 1)
    else:
        second = columns >= n_pairs
        pairs = tl.where(second, columns - n_pairs, columns)
        others = tl.where(second, columns - n_pairs, columns + n_pairs)
    return columns, tl.where(rotated, others, columns), pairs, rotated, second


@triton.jit
def _load(ptr, offsets, columns, valid, dim):
    inside = valid[:, None] & (columns < dim)[None, :]
    return tl.load(ptr + offsets[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _statistics(x, columns, dim, eps, NORM: tl.constexpr):
    """Return (mean, 1 / deviation) of rows [BLOCK_M]."""
    in_row = (columns < dim)[None, :]
    if NORM == _LAYER:
        mean = row_mean(x, in_row, dim)
    else:
        mean = tl.zeros([x.shape[0]], tl.float32)
    centered = tl.where(in_row, x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centered * centered, 1) / dim + eps)


@triton.jit
def _normed(x, mean, rstd, heads, columns, dim):
    """Apply the norm and its weight to columns of rows whose statistics are known."""
    z = (x - mean[:, None]) * rstd[:, None]
    if heads.weight is not None:
        z *= tl.load(heads.weight + columns, mask=columns < dim, other=0.0).to(tl.float32)[None, :]
    if heads.bias is not None:
        z += tl.load(heads.bias + columns, mask=columns < dim, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _rotate(
    heads, angles, y_ptr, block, n_rows, length, dim, eps, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, IN_PLACE: tl.constexpr,
):
    rows = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    valid = rows < n_rows
    token, position, batch, offsets = _places(rows, heads, n_rows, length)
    columns, others, pairs, rotated, second = _columns(angles.n_pairs, BLOCK_D, INTERLEAVED)
    x = _load(heads.x, offsets, columns, valid, dim)  # [BLOCK_M, BLOCK_D]
    other = _load(heads.x, offsets, others, valid, dim)
    if NORM != _NONE:
        mean, rstd = _statistics(x, columns, dim, eps, NORM)
        x = _normed(x, mean, rstd, heads, columns, dim)
        other = _normed(other, mean, rstd, heads, others, dim)
    cos, sin = _angles(angles, token, position, batch, pairs, rotated)
    y = x * cos + tl.where(second[None, :], other, -other) * sin
    inside = valid[:, None] & (columns < dim)[None, :]
    _write(y_ptr, y, offsets, rows, columns, inside, dim, IN_PLACE)


@triton.jit(do_not_specialize=COUNTS)
def _rotary_forward(
    query, key, angles, query_out_ptr, key_out_ptr, n_tokens, length, dim, eps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    n_queries = n_tokens * query.n_heads
    blocks = tl.cdiv(n_queries, BLOCK_M)
    block = tl.program_id(0)
    if block < blocks:
        _rotate(
            query, angles, query_out_ptr, block, n_queries, length, dim, eps, BLOCK_M, BLOCK_D,
            INTERLEAVED, NORM, IN_PLACE,
        )
    else:
        _rotate(
            key, angles, key_out_ptr, block - blocks, n_tokens * key.n_heads, length, dim, eps,
            BLOCK_M, BLOCK_D, INTERLEAVED, NORM, IN_PLACE,
        )


@triton.jit
def _turn_back(
    heads, grads, angles, dx_ptr, sums_ptr, n_rows, length, dim, eps, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, IN_PLACE: tl.constexpr,
):
    columns, others, pairs, rotated, second = _columns(angles.n_pairs, BLOCK_D, INTERLEAVED)
    in_row = columns < dim
    weight = tl.full([BLOCK_D], 1.0, tl.float32)
    if heads.weight is not None:
        weight = tl.load(heads.weight + columns, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_M).to(tl.int64) + block * BLOCK_M  # [BLOCK_M]
        valid = rows < n_rows
        token, position, batch, offsets = _places(rows, heads, n_rows, length)
        _, _, _, grad_offsets = _places(rows, grads, n_rows, length)
        cos, sin = _angles(angles, token, position, batch, pairs, rotated)
        dy = _load(grads.x, grad_offsets, columns, valid, dim)  # [BLOCK_M, BLOCK_D]
        other = _load(grads.x, grad_offsets, others, valid, dim)
        dz = dy * cos + tl.where(second[None, :], -other, other) * sin
        if NORM != _NONE:
            x = _load(heads.x, offsets, columns, valid, dim)
            mean, rstd = _statistics(x, columns, dim, eps, NORM)
            normed = tl.where(in_row[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)
            if NEEDS_WEIGHT:
                dweight += dz * normed
                dbias += dz
            dnormed = dz * weight[None, :]
            dnormed -= normed * (tl.sum(dnormed * normed, 1) / dim)[:, None]
            if NORM == _LAYER:
                dnormed -= (tl.sum(dz * weight[None, :], 1) / dim)[:, None]
            dz = dnormed * rstd[:, None]
        inside = valid[:, None] & in_row[None, :]
        _write(dx_ptr, dz, grad_offsets, rows, columns, inside, dim, IN_PLACE)
    if NEEDS_WEIGHT:
        tl.store(sums_ptr + columns, tl.sum(dweight, 0), mask=in_row)
        tl.store(sums_ptr + dim + columns, tl.sum(dbias, 0), mask=in_row)


@triton.jit(do_not_specialize=COUNTS)
def _rotary_backward(
    query, key, query_grads, key_grads, angles, query_dx_ptr, key_dx_ptr, partials_ptr, n_tokens,
    length, dim, eps, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, IN_PLACE: tl.constexpr,
):
    sums_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * 4 * dim
    _turn_back(
        query, query_grads, angles, query_dx_ptr, sums_ptr, n_tokens * query.n_heads, length, dim,
        eps, BLOCK_M, BLOCK_D, INTERLEAVED, NORM, NEEDS_WEIGHT, IN_PLACE,
    )
    _turn_back(
        key, key_grads, angles, key_dx_ptr, sums_ptr + 2 * dim, n_tokens * key.n_heads, length,
        dim, eps, BLOCK_M, BLOCK_D, INTERLEAVED, NORM, NEEDS_WEIGHT, IN_PLACE,
    )


@planned
def rotary_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    weights: tuple[torch.Tensor | None, ...],
    norm: str,
    eps: float,
    interleaved: bool,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the rotated ``[batch, length, heads, dim]`` of queries and keys.

    They are contiguous, or with ``in_place`` written over ``query`` and ``key``, by their strides.
    ``weights`` are the norms' weight and bias for queries, then for keys. ``cos`` and ``sin`` are
    ``[batch or 1, positions, pairs]``, ``positions`` is ``[batch, length]`` and contiguous.
    """
    out = _outputs(query, key, in_place)
    batch, length, _, dim = query.shape
    if query.numel() + key.numel() == 0:
        return out[0], out[1]
    heads = _heads(query, *weights[:2]), _heads(key, *weights[2:])
    config = _config("rotary_forward", 2048, query)
    blocks = [targets.ceil_div(t.numel() // dim, config.block_m) for t in (query, key)]
    launch(
        _rotary_forward, (sum(blocks),), config, *heads, _angles_of(cos, sin, positions), *out,
        batch * length, length, dim, eps, BLOCK_M=config.block_m, BLOCK_D=config.block_n,
        INTERLEAVED=interleaved, NORM=NORMS[norm], IN_PLACE=in_place,
    )
    return out[0], out[1]


@planned
def rotary_backward(
    query_grad: torch.Tensor,
    key_grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    weights: tuple[torch.Tensor | None, ...],
    norm: str,
    eps: float,
    interleaved: bool,
    needs_weights: bool,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute (dquery, dkey, gradients of the weights ``[4, dim]`` in float32 if needed).

    ``query`` and ``key`` are read where there is a norm, and else give shapes alone. ``in_place``
    writes over the gradients that were given, by their strides.
    """
    dx = _outputs(query_grad, key_grad, in_place)
    batch, length, _, dim = query.shape
    wanted = needs_weights and norm != "none"
    if query.numel() + key.numel() == 0:
        zeros = query.new_zeros(4, dim, dtype=torch.float32) if wanted else None
        return dx[0], dx[1], zeros
    heads = _heads(query, *weights[:2]), _heads(key, *weights[2:])
    grads = [_heads(grad, None, None) for grad in (query_grad, key_grad)]
    config = _config("rotary_backward", 2048 if norm == "none" else 1024, query)
    blocks = targets.ceil_div(max(query.numel(), key.numel()) // dim, config.block_m)
    programs = configs.row_programs(blocks, targets.target_of(query.device))
    shape = (programs if wanted else 0, 4 * dim)
    partials = torch.empty(shape, dtype=torch.float32, device=query.device)
    launch(
        _rotary_backward, (programs,), config, *heads, *grads, _angles_of(cos, sin, positions), *dx,
        partials, batch * length, length, dim, eps, BLOCK_M=config.block_m, BLOCK_D=config.block_n,
        INTERLEAVED=interleaved, NORM=NORMS[norm], NEEDS_WEIGHT=wanted, IN_PLACE=in_place,
    )
    return dx[0], dx[1], sum_partials(partials).view(4, dim) if wanted else None


def _outputs(
    query: torch.Tensor, key: torch.Tensor, in_place: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensors that a launch writes to."""
    if in_place:
        return query, key
    first, second = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key))
    return first, second


def _heads(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Heads:
    if x.stride(-1) != 1:
        x = contiguous(x)
    weight, bias = contiguous_vector(weight), contiguous_vector(bias)
    stride_batch, stride_token, stride_head, _ = x.stride()
    return Heads(x, weight, bias, stride_batch, stride_token, stride_head, x.shape[2])


def _angles_of(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None) -> Angles:
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = contiguous(cos), contiguous(sin)
    positions = None if positions is None else contiguous(positions)
    batch = 0 if cos.shape[0] == 1 else cos.stride(0)
    return Angles(cos, sin, positions, batch, cos.stride(1), cos.shape[2])


def _config(kernel: str, tile: int, query: torch.Tensor) -> targets.TileConfig:
    target = targets.target_of(query.device)
    return configs.row_tile(kernel, query.shape[-1], MAX_HEAD_DIM, tile, tile // 128, target)
