"""Work lists of packed sequences: which program computes which block of which sequence.

One program a sequence counts the blocks of all sequences that go before it, those with more work
a block first, and writes its own blocks behind them; so that a long sequence never starts last.
Lengths stay on the device. Reads the starts once a program, writes 8 bytes a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedformer_kernels.runtime import configs
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS
from fusedformer_kernels.runtime.steps import step
from fusedformer_kernels.runtime.strided import contiguous_vector

# Name of a dict on ``starts``, if its maker says that it will not change: lists are then made once
# for all layers, forward and backward. Its entry "by_graph" says whether ``starts`` was made while
# a CUDA graph was captured. Lists are shared within graphs or outside of them, never across: each
# replay writes those of its graph anew, and one from before would stay as it is in every replay.
SHARED = "fusedformer_work_lists"


@triton.jit(do_not_specialize=COUNTS)
def _list_work(
    starts_ptr, others_ptr, work_ptr, n_sequences, capacity, LENGTH: tl.constexpr,
    LAST_FIRST: tl.constexpr, CHUNK: tl.constexpr,
):
    """Sequences are split in blocks of LENGTH rows; a block costs the length on the other side."""
    sequence = tl.program_id(0)
    is_real = sequence < n_sequences  # the last program fills up what is left with -1
    own = tl.minimum(sequence, n_sequences - 1)
    cost = tl.load(others_ptr + own + 1) - tl.load(others_ptr + own)
    before = tl.zeros([CHUNK], tl.int32)
    for start in range(0, n_sequences, CHUNK):
        index = start + tl.arange(0, CHUNK)
        valid = index < n_sequences
        length = tl.load(starts_ptr + index + 1, mask=valid, other=0)
        length -= tl.load(starts_ptr + index, mask=valid, other=0)
        other = tl.load(others_ptr + index + 1, mask=valid, other=0)
        other -= tl.load(others_ptr + index, mask=valid, other=0)
        first = (other > cost) | ((other == cost) & (index < sequence)) | (not is_real)
        blocks = (length.to(tl.int32) + (LENGTH - 1)) // LENGTH
        before += tl.where(valid & first, blocks, 0)
    begin = tl.sum(before, 0)
    own_length = tl.load(starts_ptr + own + 1) - tl.load(starts_ptr + own)
    count = (own_length.to(tl.int32) + (LENGTH - 1)) // LENGTH
    if not is_real:
        count = capacity - begin
    for start in range(0, count, CHUNK):
        block = start + tl.arange(0, CHUNK)
        valid = block < count
        entry = work_ptr + 2 * (begin + block)
        number = block
        if LAST_FIRST:
            number = count - 1 - block
        tl.store(entry, tl.where(is_real, sequence, -1) + block * 0, mask=valid)
        tl.store(entry + 1, number, mask=valid)


@step
def work_list(
    starts: torch.Tensor,
    other_starts: torch.Tensor,
    tokens: int,
    longest: int,
    block: int,
    last_first: bool,
) -> torch.Tensor:
    """int32 [capacity, 2] of (sequence, block of rows), -1 behind the last; no host sync.

    Args:
        starts: ``[sequences + 1]`` of the side that is split in blocks.
        other_starts: of the side that each block walks.
        tokens, longest: how many rows there are in all, and at most in one sequence.
        block: rows of a block.
        last_first: whether the last blocks of a sequence are the most work (causal).
    """
    shared = getattr(starts, SHARED, None)
    if shared is not None and shared["by_graph"] != _is_capturing(starts):
        shared = None
    key = (other_starts.data_ptr(), tokens, longest, block, last_first)
    if shared is not None and key in shared:
        found: torch.Tensor = shared[key]
        return found
    sequences = starts.numel() - 1
    capacity = min(tokens // block + sequences, sequences * configs.ceil_div(longest, block))
    work = torch.empty((capacity, 2), dtype=torch.int32, device=starts.device)
    launch(
        _list_work, (sequences + 1,), configs.LaunchConfig(4, 2), contiguous_vector(starts),
        contiguous_vector(other_starts), work, sequences, capacity, LENGTH=block,
        LAST_FIRST=last_first, CHUNK=256,
    )
    if shared is not None:
        shared[key] = work
    return work


def _is_capturing(starts: torch.Tensor) -> bool:
    return starts.is_cuda and torch.cuda.is_current_stream_capturing()
