"""Add up the gradient of queries over blocks of keys, in the order of the keys whatever runs when.

For the backward in one pass over the keys (backward.py): the program of each block of keys adds its
share of dq to float32 sums. It waits for its turn at each tile of queries, which comes after that
of the block of keys before: the same sums, bit for bit, in every run. Programs number themselves by
a ticket, so that those waited for have all begun, in whatever order a GPU begins them; each goes
back from its last queries, looks at a turn before its last two products, and takes it after them,
once it has given the tile before on, whose adds have had the time to arrive.

The sums of a tile lie in memory as threads hold a product on tensor cores, rows i, i + 8 of columns
j, j + 1 together: 16 bytes for each add. Writes zeros once and reads the sums once, 4 bytes an
element; each block of keys adds 4 bytes an element of the queries that it sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import (
    AttentionArguments,
    Layout,
    Sizes,
)
from fusedformer_kernels.attention.schedule import first_tile, tiles_of_all
from fusedformer_kernels.attention.tiles import place_of, query_rows, store_rows, which_block
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS, INTERPRET


class QuerySums(NamedTuple):
    """Sums as kernels get them; without sums there is one pass for keys and one for queries."""

    sums: Any = None  # float32, BLOCK_M * BLOCK_D for each tile
    turns: Any = None  # int32: programs that have begun, then blocks of keys in each tile's sums
    wide: Any = None  # 1: each thread adds 16 bytes at once


@triton.jit
def block_of_ticket(ticket, work, heads, blocks):
    """Find (sequence, head, block) of a ticket; see ``which_block``.

    Blocks of 64 heads are worked on side by side, so that few of one wait for each other at a time;
    of packed sequences those of one sequence.
    """
    if work is not None:
        entry = work + 2 * (ticket // heads)
        sequence = tl.load(entry)
        block = tl.load(entry + 1)
    else:
        first = ticket // (64 * blocks) * 64
        others = tl.minimum(tl.num_programs(0) // blocks - first, 64)
        ticket -= first * blocks
        block = ticket // others
        ticket = first + ticket % others
        sequence = ticket // heads
    return sequence, ticket % heads, block


@triton.jit
def first_sum(s, sizes, place, sequence, sum_tiles, BLOCK_M: tl.constexpr):
    """Number the first tile of queries of ``place``. Each head has ``sum_tiles``."""
    first = first_tile(s.starts_q, place.q_start, place.batch, sequence, sizes.queries, BLOCK_M)
    return (place.head * sum_tiles + first).to(tl.int32)


@triton.jit
def look_at_turn(turn):
    """Load a turn without waiting for it, for :func:`take_turn`, in the first thread."""
    seen = 0
    if not INTERPRET:
        seen = tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            mov.b32 $0, 0;
            @first ld.relaxed.gpu.global.s32 $0, [$1];
            }""",
            "=r,l", [turn.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )
    return seen


@triton.jit
def take_turn(turn, seen, number, goes_on):
    """Give the turn of the tile before on, if there is one, and wait until this one is ``number``.

    The tile before is the next one in memory. The first thread does it for all. A barrier is
    between its fence and what others have added to the tile before, since the product that is added
    now takes what all warps have stored for it. Under the interpreter programs run one after
    another.
    """
    if not INTERPRET:
        # A loop of Triton's own in a loop would leave that one without a pipeline.
        tl.inline_asm_elementwise(
            """{
            .reg .pred done;
            .reg .s32 now;
            mov.u32 now, %tid.x;
            setp.ne.u32 done, now, 0;
            @done bra taken;
            fence.acq_rel.gpu;
            setp.ne.s32 done, $4, 0;
            @done red.relaxed.gpu.global.add.s32 [$1 + 4], 1;
            mov.s32 now, $2;
            again:
            setp.ge.s32 done, now, $3;
            @done bra taken;
            ld.acquire.gpu.global.s32 now, [$1];
            bra again;
            taken:
            bar.sync 0;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r,r", [turn.to(tl.int64), seen, number, goes_on.to(tl.int32)], dtype=tl.int32,
            is_pure=False, pack=1,
        )


@triton.jit
def end_turn(turn, any_taken):
    """Give the turn of the last tile on, if any was taken."""
    if not INTERPRET:
        tl.inline_asm_elementwise(
            """{
            .reg .pred here;
            .reg .b32 thread;
            bar.sync 0;
            mov.u32 thread, %tid.x;
            setp.ne.u32 here, thread, 0;
            @here bra given;
            setp.ne.s32 here, $2, 0;
            @here red.release.gpu.global.add.s32 [$1], 1;
            given:
            mov.b32 $0, 0;
            }""",
            "=r,l,r", [turn.to(tl.int64), any_taken.to(tl.int32)], dtype=tl.int32, is_pure=False,
            pack=1,
        )


@triton.jit
def add_share(sums, share, WIDE: tl.constexpr):
    """Add ``share`` [BLOCK_D, BLOCK_M] to a tile of the sums."""
    DIMS: tl.constexpr = share.shape[0]
    ROWS: tl.constexpr = share.shape[1]
    parts = tl.reshape(share, [DIMS // 16, 2, 8, ROWS // 8, 4, 2])
    even, odd = tl.split(tl.permute(parts, [0, 3, 2, 4, 1, 5]))
    one, three = tl.split(even)
    two, four = tl.split(odd)  # [DIMS // 16, ROWS // 8, 8, 4]
    offsets = (tl.arange(0, DIMS // 16) * (ROWS * 16))[:, None, None, None]
    offsets += (tl.arange(0, ROWS // 8) * 128)[None, :, None, None]
    offsets += (tl.arange(0, 8) * 16)[:, None] + (tl.arange(0, 4) * 4)[None, :]
    pointers = sums + offsets
    if WIDE:  # Triton would pass the share through shared memory, to add rows of it
        tl.inline_asm_elementwise(
            """{
            red.relaxed.gpu.global.add.v4.f32 [$1], {$2, $3, $4, $5};
            mov.b32 $0, 0;
            }""",
            "=r,l,f,f,f,f", [pointers.to(tl.int64), one, two, three, four], dtype=tl.int32,
            is_pure=False, pack=1,
        )
    else:
        tl.atomic_add(pointers, one, sem="relaxed")
        tl.atomic_add(pointers + 1, two, sem="relaxed")
        tl.atomic_add(pointers + 2, three, sem="relaxed")
        tl.atomic_add(pointers + 3, four, sem="relaxed")


@triton.jit
def _clear_query_sums(sums_ptr, turns_ptr, TILE: tl.constexpr):
    """Write zeros to a tile and its turn, and in the first program to the tickets."""
    tile = tl.program_id(0)
    offsets = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(sums_ptr + offsets, tl.zeros([TILE], tl.float32))
    tl.store(turns_ptr + 1 + tile, 0)
    if tile == 0:
        tl.store(turns_ptr, 0)


@triton.jit(do_not_specialize=COUNTS)
def _store_query_sums(
    sums_ptr, dq_ptr, work_ptr, s, heads, queries, keys, in_sixteens, radius, dq_layout, sum_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """Write a tile of dq from its sums."""
    sizes = Sizes(heads, queries, keys, in_sixteens, radius)
    sequence, head, block = which_block(
        work_ptr, sizes.heads, tl.cdiv(sizes.queries, BLOCK_M), False
    )
    if work_ptr is not None:  # noqa: SIM102 (decided by the compiler, unlike the inner one)
        if sequence < 0:
            return
    place = place_of(s, sizes, sequence, head)
    tile = first_sum(s, sizes, place, sequence, sum_tiles, BLOCK_M) + block
    sums = tl.load(sums_ptr + tile * (BLOCK_M * BLOCK_D) + tl.arange(0, BLOCK_M * BLOCK_D))
    # As add_share laid them out: [dim // 16, row // 8, dim, row, dim % 16 // 8, row % 2].
    parts = tl.reshape(sums, [BLOCK_D // 16, BLOCK_M // 8, 8, 4, 2, 2])
    dq = tl.reshape(tl.permute(parts, [1, 3, 5, 0, 4, 2]), [BLOCK_M, BLOCK_D])
    dq *= s.scale
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    store_rows(
        query_rows(dq_ptr, dq_layout, place), dq_layout, rows, rows < place.n_queries, dq,
        HEAD_DIM, BLOCK_D,
    )


def cleared_query_sums(
    arguments: AttentionArguments,
    query: torch.Tensor,
    target: targets.Target,
    config: configs.AttentionConfig,
) -> tuple[QuerySums, int]:
    """Make sums of zeros for tiles of queries: (sums, tiles of each head)."""
    heads, n_rows = query.shape[1:3]
    block_m, block_d = config.block_m, arguments.constants["BLOCK_D"]
    tiles = tiles_of_all(arguments, n_rows, block_m)
    count, size = heads * tiles, block_m * block_d
    sums = torch.empty(count * size, dtype=torch.float32, device=query.device)
    turns = torch.empty(count + 1, dtype=torch.int32, device=query.device)
    launch(_clear_query_sums, (count,), targets.LaunchConfig(4, 2), sums, turns, TILE=size)
    # Of narrower products several warps hold the same rows, each of which would add its own; and
    # what threads hold is known of HGMMA.
    wide = (
        target.arch == 90 and not target.interpreted and arguments.kind.operands == "half"
        and block_d >= 16 * config.num_warps
    )
    return QuerySums(sums, turns, 1 if wide else None), tiles


def store_query_sums(
    query_sums: QuerySums,
    sum_tiles: int,
    dq: torch.Tensor,
    dq_layout: Layout,
    work: torch.Tensor | None,
    blocks: int,
    arguments: AttentionArguments,
    block_m: int,
) -> None:
    """Fill ``dq``; ``work`` and ``blocks`` are those of a kernel that owns blocks of queries."""
    constants = arguments.constants
    launch(
        _store_query_sums, (blocks * dq.shape[1],), targets.LaunchConfig(4, 2), query_sums.sums, dq,
        work, arguments.scores, *arguments.sizes, dq_layout, sum_tiles,
        HEAD_DIM=constants["HEAD_DIM"], BLOCK_D=constants["BLOCK_D"], BLOCK_M=block_m,
    )
