"""Spread a table of relative biases over all distances of a call, in float32.

    spread[h, middle + distance] = table[h, clamp(distance)]

A tile of scores then has its biases at consecutive places: nothing is clamped element by element,
and pipelined loops copy four bytes an element to shared memory, which they cannot with two. A
program writes a chunk of a head's distances.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS
from fusedformer_kernels.runtime.targets import LaunchConfig, ceil_div

_CHUNK = 1024
_BEYOND = 256  # distances of the rows and columns that tiles have beyond a sequence


@triton.jit(do_not_specialize=COUNTS)
def _spread_table(
    table_ptr, spread_ptr, table_head, table_column, radius, middle, chunks, CHUNK: tl.constexpr,
):
    head = (tl.program_id(0) // chunks).to(tl.int64)
    entry = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    nearest = tl.minimum(tl.maximum(entry - middle, -radius), radius)
    bias = tl.load(table_ptr + head * table_head + (nearest + radius) * table_column)
    tl.store(spread_ptr + head * (2 * middle) + entry, bias.to(tl.float32), mask=entry < 2 * middle)


def spread_table(table: torch.Tensor, max_queries: int, max_keys: int) -> tuple[torch.Tensor, int]:
    """Return ``spread`` [1 or H, 2 * middle] and ``middle``, for a ``table`` [1 or H, 2R + 1].

    Distances are less than the sum of the lengths, whichever ends queries and keys are aligned at.
    """
    heads, width = table.shape
    middle = 16 * ceil_div(max_queries + max_keys + _BEYOND, 16)
    spread = torch.empty((heads, 2 * middle), dtype=torch.float32, device=table.device)
    chunks = ceil_div(2 * middle, _CHUNK)
    launch(
        _spread_table, (heads * chunks,), LaunchConfig(4, 1), table, spread, table.stride(0),
        table.stride(1), width // 2, middle, chunks, CHUNK=_CHUNK,
    )
    return spread, middle
