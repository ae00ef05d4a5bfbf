"""Attention's forward for sm_90 with specialized warps, in Gluon: what :mod:`forward` computes.

A program has 12 warps and 128 queries of one head. Four warps, the producer, copy tiles of keys and
values into rings of shared memory, with zeros beyond the sequence's end. Two times four, the
consumers, have 64 queries each: they multiply, and take the softmax of one tile while the tensor
cores multiply the values of the tile before it. Producer and consumers meet by mbarriers alone. The
producer needs few registers, and the consumers get what it gives back.

Copies are cp.async, 16 bytes a thread; or, where a config asks for it and sequences end where
tensors do, TMA: then one thread asks for whole tiles, and the producer is one warp (the other three
do nothing).

By the same device functions, tiles in the same order and products of the same shape, it gives the
bits of the other kernel with tiles of the same BLOCK_N. It is launched only where a table of tuned
configs says so. Source: Shah et al., FlashAttention-3, arXiv:2407.08608.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import AttentionArguments, Sizes, layout_of
from fusedformer_kernels.attention.scores import (
    log_sum_exp,
    online_softmax_update,
    score_tile,
    sink_of,
    store_row_statistics,
    with_sink,
)
from fusedformer_kernels.attention.tiles import (
    key_tiles_of_rows,
    matrix_of,
    place_of,
    row_pointer,
    row_stride,
    which_block,
)
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.boxes import boxes_of, can_be_boxed
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS, cast, store

# Triton 3.9 has renamed them.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
copy_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

GROUP = gl.constexpr(64)  # queries of a consumer: the rows of a product of four warps
PIECE = gl.constexpr(32)  # rows that the producer copies at a time
THREADS = gl.constexpr(128)  # of the producer, and of a consumer
# A thread's, which setmaxnreg moves: 128 threads with 56 and 256 with 224 are an SM's registers.
PRODUCER_REGISTERS = gl.constexpr(56)
CONSUMER_REGISTERS = gl.constexpr(224)
TMA_PRODUCER_REGISTERS = gl.constexpr(24)
TMA_CONSUMER_REGISTERS = gl.constexpr(240)
BLOCK_M = 128  # queries of a program
BOX_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=4)  # of rows of 128 bytes, or two such halves


class Ring(NamedTuple):
    """Tiles of shared memory that the producer fills one after the other, for device code."""

    tiles: Any  # [STAGES, BLOCK_N, dims]
    ready: Any  # mbarriers [STAGES, 1]: the tile's copies are done
    free: Any  # the same: both consumers are done with the tile


@gluon.jit
def _new_tiles(source, N: gl.constexpr, ROWS: gl.constexpr, DIMS: gl.constexpr, TMA: gl.constexpr):
    """Allocate N tiles [ROWS, DIMS] for what ``source`` points to or, with TMA, describes."""
    if TMA:
        shape: gl.constexpr = [N] + source.block_shape  # noqa: RUF005 (Triton knows no star)
        tiles = gl.allocate_shared_memory(source.dtype, shape, source.layout)
    else:
        dtype: gl.constexpr = source.dtype.element_ty
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIMS], dtype)
        tiles = gl.allocate_shared_memory(dtype, [N, ROWS, DIMS], layout)
    return tiles


@gluon.jit
def _new_ring(
    source, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, DIMS: gl.constexpr, TMA: gl.constexpr
):
    """Allocate a ring whose tiles are all free."""
    tiles = _new_tiles(source, STAGES, BLOCK_N, DIMS, TMA)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1 if TMA else THREADS)
        mbarrier.init(free.index(stage), count=2)
    return Ring(tiles, ready, free)


@gluon.jit
def _turn(turn, STAGES: gl.constexpr):
    """Find the stage that holds the tile of this turn, and the parity of its phase."""
    return turn % STAGES, (turn // STAGES) & 1


@gluon.jit
def _copy_rows(
    base, first, n_rows, layout, tile, ready, DIM: gl.constexpr, BLOCK: gl.constexpr,
    BLOCK_D: gl.constexpr,
):
    """Copy rows [first, first + BLOCK) of a [sequence, head_dim] matrix; what is outside is 0."""
    chunks: gl.constexpr = BLOCK_D // 8  # of 16 bytes, one a thread
    threads: gl.constexpr = gl.BlockedLayout([1, 8], [32 // chunks, chunks], [4, 1], [1, 0])
    dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, threads))
    wide_stride = row_stride(layout)
    for piece in gl.static_range(BLOCK // PIECE):
        # An instruction that stays where it is: addresses that are computed before their piece,
        # or even before the warps part, would take registers that others need.
        rows = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [gl.arange(0, PIECE, gl.SliceLayout(1, threads))],
            dtype=gl.int32, is_pure=False, pack=1,
        )
        start = first + piece * PIECE
        valid = (rows < n_rows - start)[:, None] & (dims < DIM)[None, :]
        offsets = (rows * wide_stride)[:, None] + dims[None, :]
        part = tile.slice(piece * PIECE, PIECE)
        copy_async(part, base + start * wide_stride + offsets, mask=valid)
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def _copy_tile(
    source, layout, batch, head, first, n_rows, tile, ready, DIM: gl.constexpr,
    BLOCK: gl.constexpr, BLOCK_D: gl.constexpr, TMA: gl.constexpr,
):
    """Copy rows [first, first + BLOCK) of a matrix, or of a tensor that ``source`` describes."""
    if TMA:
        mbarrier.expect(ready, BLOCK * BLOCK_D * source.dtype.primitive_bitwidth // 8)
        batch, head = batch.to(gl.int32), head.to(gl.int32)
        if source.block_shape[1] == 1:
            copy_box(source, [batch, head, first, 0], ready, tile)
        else:  # heads lie within rows
            copy_box(source, [batch, first, head, 0], ready, tile)
    else:
        _copy_rows(source, first, n_rows, layout, tile, ready, DIM, BLOCK, BLOCK_D)


@gluon.jit
def _produce(
    q_source, k_source, v_source, q_layout, k_layout, v_layout, place, first_row, first, last,
    q_tiles, q_ready, k_ring, v_ring, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TMA: gl.constexpr,
):
    """Copy the queries, and tiles of keys and values as their stages become free."""
    for group in range(2):
        _copy_tile(
            q_source, q_layout, place.batch, place.head, first_row + group * GROUP,
            place.n_queries, q_tiles.index(group), q_ready, HEAD_DIM, GROUP, BLOCK_D, TMA,
        )
    for index in range(first, last):
        stage, phase = _turn(index - first, STAGES)
        # The phase before the first counts as complete.
        mbarrier.wait(k_ring.free.index(stage), phase ^ 1)
        _copy_tile(
            k_source, k_layout, place.batch, place.key_head, index * BLOCK_N, place.n_keys,
            k_ring.tiles.index(stage), k_ring.ready.index(stage), HEAD_DIM, BLOCK_N, BLOCK_D, TMA,
        )
        mbarrier.wait(v_ring.free.index(stage), phase ^ 1)
        _copy_tile(
            v_source, v_layout, place.batch, place.key_head, index * BLOCK_N, place.n_keys,
            v_ring.tiles.index(stage), v_ring.ready.index(stage), VALUE_DIM, BLOCK_N, BLOCK_D, TMA,
        )


@gluon.jit
def _begin_scores(
    q, k_ring, turn, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TMA: gl.constexpr,
    layout: gl.constexpr,
):
    """Begin to multiply the queries [GROUP, dims] by the keys of this turn."""
    stage, phase = _turn(turn, STAGES)
    mbarrier.wait(k_ring.ready.index(stage), phase)
    if not TMA:
        fence_async_shared()
    zeros = gl.zeros([GROUP, BLOCK_N], gl.float32, layout)
    keys = k_ring.tiles.index(stage).reshape([BLOCK_N, q.shape[1]]).permute((1, 0))
    return warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def _begin_output(weights, acc, v_ring, turn, STAGES: gl.constexpr, TMA: gl.constexpr):
    """Begin to add the weights' product with the values of this turn."""
    stage, phase = _turn(turn, STAGES)
    mbarrier.wait(v_ring.ready.index(stage), phase)
    if not TMA:
        fence_async_shared()
    values = v_ring.tiles.index(stage).reshape([weights.shape[1], acc.shape[1]])
    return warpgroup_mma(weights, values, acc, is_async=True)


@gluon.jit
def _release(ring, turn, STAGES: gl.constexpr):
    """Tell the producer that this consumer is done with the tile of this turn."""
    mbarrier.arrive(ring.free.index(turn % STAGES), count=1)


@gluon.jit
def _weights_of(
    product, top, total, first_row, first_column, s, sizes, place, CHECKED: gl.constexpr,
    layout: gl.constexpr,
):
    """Do one step of the online softmax over a tile [GROUP, BLOCK_N] of products."""
    rows = first_row + gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    columns = first_column + gl.arange(0, product.shape[1], gl.SliceLayout(0, layout))
    scores, _ = score_tile(
        product, rows[:, None], columns[None, :], True, s, sizes, place, None, CHECKED, False
    )
    return online_softmax_update(scores, top, total, s, False)


@gluon.jit
def _attend(
    q, weights, acc, top, total, first, begin, end, first_row, s, sizes, place, k_ring, v_ring,
    pin, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TMA: gl.constexpr, CHECKED: gl.constexpr,
    score_layout: gl.constexpr, out_layout: gl.constexpr,
):
    """Go on with tiles [begin, end); ``weights`` are those of the tile before ``begin``.

    The values of a tile are multiplied while the weights of the next one are computed. ``pin`` is
    shared memory for a row's sum, which nobody reads: it holds the last wait in its place.
    """
    for index in range(begin, end):
        turn = index - first
        scores = _begin_scores(q, k_ring, turn, BLOCK_N, STAGES, TMA, score_layout)
        acc = _begin_output(weights, acc, v_ring, turn - 1, STAGES, TMA)
        scores = warpgroup_mma_wait(1, deps=[scores])
        _release(k_ring, turn, STAGES)
        tile_weights, rescale, top, total = _weights_of(
            scores, top, total, first_row, index * BLOCK_N, s, sizes, place, CHECKED, score_layout
        )
        pin.store(total)  # without it ptxas waits before the exponentials, not behind them
        acc = warpgroup_mma_wait(0, deps=[acc])
        _release(v_ring, turn - 1, STAGES)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, out_layout))[:, None]
        weights = gl.convert_layout(cast(tile_weights, q.dtype), weights.type.layout)
    return weights, acc, top, total


@gluon.jit
def _consume(
    GROUP_NUMBER: gl.constexpr, o_ptr, lse_ptr, statistics_ptr, o_layout, lse_rows, plane,
    first_row, first, full, last, s, sizes, place, q_tiles, q_ready, k_ring, v_ring,
    VALUE_DIM: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    TMA: gl.constexpr,
):
    """Walk all keys with 64 of the program's queries, and store what comes out."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, score_layout)
    first_row += GROUP_NUMBER * GROUP
    q = q_tiles.index(GROUP_NUMBER).reshape([GROUP, BLOCK_D])
    acc = gl.zeros([GROUP, BLOCK_D], gl.float32, out_layout)
    top = gl.full([GROUP], float("-inf"), gl.float32, by_row)
    total = gl.zeros([GROUP], gl.float32, by_row)

    pin = gl.allocate_shared_memory(gl.float32, [GROUP], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mbarrier.wait(q_ready, 0)
    scores = _begin_scores(q, k_ring, 0, BLOCK_N, STAGES, TMA, score_layout)
    scores = warpgroup_mma_wait(0, deps=[scores])
    _release(k_ring, 0, STAGES)
    weights, _, top, total = _weights_of(
        scores, top, total, first_row, first * BLOCK_N, s, sizes, place, True, score_layout
    )
    weights = gl.convert_layout(cast(weights, q.dtype), gl.DotOperandLayout(0, out_layout, 2))
    whole = gl.maximum(gl.minimum(full, last), first + 1)
    weights, acc, top, total = _attend(
        q, weights, acc, top, total, first, first + 1, whole, first_row, s, sizes, place, k_ring,
        v_ring, pin, BLOCK_N, STAGES, TMA, False, score_layout, out_layout,
    )
    weights, acc, top, total = _attend(
        q, weights, acc, top, total, first, whole, last, first_row, s, sizes, place, k_ring,
        v_ring, pin, BLOCK_N, STAGES, TMA, True, score_layout, out_layout,
    )
    acc = _begin_output(weights, acc, v_ring, last - first - 1, STAGES, TMA)
    acc = warpgroup_mma_wait(0, deps=[acc])

    # A query with no visible key: total 0, output 0, log-sum-exp -inf.
    factor = gl.full([GROUP], 1.0, gl.float32, by_row)
    if s.sinks is not None:
        top, total, factor = with_sink(top, total, sink_of(s.sinks + place.head, False), False)
    factor = factor / gl.where(total == 0.0, 1.0, total)
    o = acc * gl.convert_layout(factor, gl.SliceLayout(1, out_layout))[:, None]
    rows = first_row + gl.arange(0, GROUP, by_row)
    row_valid = rows < place.n_queries
    statistics = row_pointer(statistics_ptr, sizes, place, lse_rows)
    store_row_statistics(statistics, plane, rows, row_valid, top, total)
    if lse_ptr is not None:
        lse_rows_ptr = row_pointer(lse_ptr, sizes, place, lse_rows) + rows
        gl.store(lse_rows_ptr, log_sum_exp(top, total, False), mask=row_valid)
    rows = first_row + gl.arange(0, GROUP, gl.SliceLayout(1, out_layout))
    dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, out_layout))
    o_base = matrix_of(o_ptr, o_layout, place.batch, place.head, place.q_start)
    o_rows = o_base + rows * row_stride(o_layout)
    valid = (rows < place.n_queries)[:, None] & (dims < VALUE_DIM)[None, :]
    store(o_rows[:, None] + dims[None, :], o, valid)


@gluon.jit(do_not_specialize=COUNTS)
def _attention_forward_specialized(
    q_source, k_source, v_source, o_ptr, lse_ptr, statistics_ptr, work_ptr, s, heads, queries,
    keys, in_sixteens, radius, q_layout, k_layout, v_layout, o_layout, lse_rows, plane,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TMA: gl.constexpr,
):
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    block_m: gl.constexpr = 2 * GROUP
    sequence, head, block = which_block(
        work_ptr, sizes.heads, tl.cdiv(sizes.queries, block_m), s.right is not None
    )
    if work_ptr is not None:  # noqa: SIM102 (decided by the compiler, unlike the inner one)
        if sequence < 0:
            return
    place = place_of(s, sizes, sequence, head)
    first_row = block * block_m
    first, full, last = key_tiles_of_rows(s, place, first_row, block_m, BLOCK_N)
    last = gl.maximum(last, first + 1)  # where no key is visible, one tile that is hidden

    q_tiles = _new_tiles(q_source, 2, GROUP, BLOCK_D, TMA)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=2 if TMA else 2 * THREADS)
    k_ring = _new_ring(k_source, STAGES, BLOCK_N, BLOCK_D, TMA)
    v_ring = _new_ring(v_source, STAGES, BLOCK_N, BLOCK_D, TMA)
    if TMA:
        fence_async_shared()  # TMA is to see the mbarriers
    else:
        q_source = matrix_of(q_source, q_layout, place.batch, place.head, place.q_start)
        k_source = matrix_of(k_source, k_layout, place.batch, place.key_head, place.k_start)
        v_source = matrix_of(v_source, v_layout, place.batch, place.key_head, place.k_start)
    gl.warp_specialize(
        [
            (_consume, (
                0, o_ptr, lse_ptr, statistics_ptr, o_layout, lse_rows, plane, first_row, first,
                full, last, s, sizes, place, q_tiles, q_ready, k_ring, v_ring, VALUE_DIM, BLOCK_N,
                BLOCK_D, STAGES, TMA,
            )),
            (_consume, (
                1, o_ptr, lse_ptr, statistics_ptr, o_layout, lse_rows, plane, first_row, first,
                full, last, s, sizes, place, q_tiles, q_ready, k_ring, v_ring, VALUE_DIM, BLOCK_N,
                BLOCK_D, STAGES, TMA,
            )),
            (_produce, (
                q_source, k_source, v_source, q_layout, k_layout, v_layout, place, first_row,
                first, last, q_tiles, q_ready, k_ring, v_ring, HEAD_DIM, VALUE_DIM, BLOCK_N,
                BLOCK_D, STAGES, TMA,
            )),
        ],
        [4, 1 if TMA else 4],
        [
            TMA_CONSUMER_REGISTERS if TMA else CONSUMER_REGISTERS,
            TMA_PRODUCER_REGISTERS if TMA else PRODUCER_REGISTERS,
        ],
    )


def launch_specialized(
    grid: tuple[int, ...],
    config: configs.AttentionConfig,
    arguments: AttentionArguments,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    statistics: torch.Tensor,
    work: torch.Tensor | None,
) -> None:
    """Launch the kernel; tensors are those of :func:`forward.attention_forward`.

    Raises:
        ValueError: the config, or what is asked for, is not for this kernel.
    """
    if not configs.can_specialize(arguments.kind, targets.target_of(query.device)):
        raise ValueError(
            "a tuned config asks for attention with specialized warps, which is for sm_90, half "
            f"precision, equal head dims up to 128 and nothing added: not for {arguments.kind}"
        )
    if (config.block_m, config.num_warps) != (BLOCK_M, 4):
        raise ValueError(
            f"attention with specialized warps: expected block_m={BLOCK_M} and num_warps=4, but "
            f"got block_m={config.block_m} and num_warps={config.num_warps}"
        )
    names = "HEAD_DIM", "VALUE_DIM", "BLOCK_D"
    tensors = query, key, value
    sources: list[Any] = list(tensors)
    layouts = list(map(layout_of, tensors))
    by_tma = config.tma and _ends_with_tensors(arguments) and all(map(can_be_boxed, tensors))
    if by_tma:
        rows = GROUP.value, config.block_n, config.block_n
        width = arguments.constants["BLOCK_D"]
        sources = [boxes_of(x, n, width, BOX_LAYOUT) for x, n in zip(tensors, rows, strict=True)]
        layouts = [layout_of(None)] * 3  # which the descriptors hold
    launch(
        _attention_forward_specialized, grid, config, *sources, output, lse, statistics, work,
        arguments.scores, *arguments.sizes, *layouts, layout_of(output), query.shape[2],
        statistics[0].numel(), BLOCK_N=config.block_n, STAGES=config.num_stages, TMA=by_tma,
        **{name: arguments.constants[name] for name in names},
    )


def _ends_with_tensors(arguments: AttentionArguments) -> bool:
    """Return whether sequences end where tensors do, as copies by TMA take all that is there.

    What lies behind a sequence has the weight 0, but as inf or NaN it would not vanish.
    """
    return not arguments.packed and arguments.scores.key_lengths is None
