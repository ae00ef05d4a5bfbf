"""List the work on packed sequences: which program computes which block of which sequence.

Sequences with more work a block go first, so that a long one never starts last. One program for
each sequence counts the blocks of all that go before it, and writes its own behind them. Lengths
stay on the device. Each program reads the starts once; 8 bytes are written for each block.
"""

from __future__ import annotations

import weakref

import torch
import triton
import triton.language as tl

from fusedformer_kernels.attention.arguments import AttentionArguments
from fusedformer_kernels.attention.terms import AttentionTerms
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import launch
from fusedformer_kernels.runtime.primitives import COUNTS
from fusedformer_kernels.runtime.steps import step
from fusedformer_kernels.runtime.strided import contiguous_vector

MOST_LISTS = 32  # of one tensor of starts; a step takes five at most for each form of attention


class WorkLists:
    """Lists of one tensor of starts, made once for all layers, forward and backward.

    They are shared within a CUDA graph or outside of all, never across: each replay writes those
    of its graph anew, and one from before would stay as it is in every replay.
    """

    def __init__(self, starts: torch.Tensor) -> None:
        self.by_graph = _is_capturing(starts)  # whether a graph makes the starts, for itself alone
        self.made: dict[tuple[object, ...], torch.Tensor] = {}


# By the identity of the starts; an entry is gone before another tensor can have that identity.
_shared: dict[int, WorkLists] = {}


def share(starts: torch.Tensor) -> None:
    """Make the lists of ``starts`` once from now on; the caller promises that it never changes."""
    _shared[id(starts)] = WorkLists(starts)
    weakref.finalize(starts, _shared.pop, id(starts), None).atexit = False


def shared_lists(starts: torch.Tensor) -> dict[tuple[object, ...], torch.Tensor] | None:
    """Lists of ``starts`` that hold here and now, None if there is no sharing."""
    lists = _shared.get(id(starts))
    if lists is None or lists.by_graph != _is_capturing(starts):
        return None
    return lists.made


@triton.jit(do_not_specialize=COUNTS)
def _list_work(
    starts_ptr, others_ptr, work_ptr, n_sequences, capacity, LENGTH: tl.constexpr,
    LAST_FIRST: tl.constexpr, CHUNK: tl.constexpr,
):
    """Write one sequence's blocks of LENGTH rows; a block costs the length of the other side."""
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
        # Sequences longer than the call said have blocks that nobody computes.
        valid = (block < count) & (begin + block < capacity)
        entry = work_ptr + 2 * (begin + block)
        number = block
        if LAST_FIRST:
            number = count - 1 - block
        tl.store(entry, tl.zeros_like(block) + tl.where(is_real, sequence, -1), mask=valid)
        tl.store(entry + 1, number, mask=valid)


@triton.jit
def first_tile(starts, start, batch, sequence, rows, BLOCK: tl.constexpr):
    """Number the first of a sequence's tiles of BLOCK rows, among :func:`tiles_of_all`.

    ``start`` is its first row where sequences are packed, as ``starts`` says; otherwise each has
    ``rows``, and it is the sequence ``batch``.
    """
    first = batch * tl.cdiv(rows, BLOCK)
    if starts is not None:  # packed, it begins a tile of its own
        first = start // BLOCK + sequence
    return first


def tiles_of_all(arguments: AttentionArguments, rows: int, block: int) -> int:
    """Count the tiles of one head in all sequences, as :func:`first_tile` numbers them.

    ``rows`` are those of all packed sequences, or of each sequence that is padded.
    """
    if arguments.packed:
        return _most_blocks(rows, block, arguments.sequences)
    return targets.ceil_div(rows, block) * arguments.sequences


def _most_blocks(tokens: int, block: int, sequences: int) -> int:
    """Bound the blocks of packed sequences, whose lengths stay on the device."""
    return tokens // block + sequences


@step
def work_list(
    starts: torch.Tensor,
    other_starts: torch.Tensor,
    tokens: int,
    longest: int,
    block: int,
    last_first: bool,
) -> torch.Tensor:
    """Make or find int32 [capacity, 2] of (sequence, block of rows), -1 behind the last.

    Args:
        starts: ``[sequences + 1]`` of the side that is split in blocks.
        other_starts: of the side that each block walks.
        tokens, longest: how many rows there are in all, and at most in one sequence.
        block: rows of a block.
        last_first: whether the last blocks of a sequence are the most work (causal).
    """
    shared = shared_lists(starts)
    # The other side decides the order of a list alone: one of another tensor at that address is
    # still right.
    key = (other_starts.data_ptr(), tokens, longest, block, last_first)
    if shared is not None and key in shared:
        return shared[key]
    sequences = starts.numel() - 1
    capacity = min(
        _most_blocks(tokens, block, sequences), sequences * targets.ceil_div(longest, block)
    )
    work = torch.empty((capacity, 2), dtype=torch.int32, device=starts.device)
    launch(
        _list_work, (sequences + 1,), targets.LaunchConfig(4, 2), contiguous_vector(starts),
        contiguous_vector(other_starts), work, sequences, capacity, LENGTH=block,
        LAST_FIRST=last_first, CHUNK=256,
    )
    if shared is not None:
        if len(shared) >= MOST_LISTS:
            shared.clear()
        shared[key] = work
    return work


def _is_capturing(starts: torch.Tensor) -> bool:
    return starts.is_cuda and torch.cuda.is_current_stream_capturing()


def blocks_of(
    arguments: AttentionArguments, terms: AttentionTerms, tokens: int, block: int, *, of_keys: bool
) -> tuple[torch.Tensor | None, int]:
    """Find (the work list of packed sequences or None, the number of blocks of each head)."""
    longest = arguments.max_keys if of_keys else arguments.max_queries
    starts, others = terms.starts_q, terms.starts_k
    if starts is None or others is None:
        return None, targets.ceil_div(longest, block) * arguments.sequences
    if of_keys:
        starts, others = others, starts
    last_first = terms.right is not None and not of_keys
    work = work_list(starts, others, tokens, longest, block, last_first)
    return work, work.shape[0]
