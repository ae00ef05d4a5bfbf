"""Which positions of a sequence each rank of a group holds.

Plain: rank r of n has the r-th of n slices. With load balance: the r-th of 2n slices and, after
it, the r-th from the end; under a causal mask every rank then has the same number of pairs of
query and key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedformer._internal import checks
from fusedformer.distributed._agreement import agree


class Span(NamedTuple):
    """Neighbouring positions of the sequence that a rank holds together."""

    start: int  # the first one's index on the rank
    position: int  # the first one's index in the sequence
    length: int

    def of(self, tensor: Tensor, dim: int = 2) -> Tensor:
        """Return these positions of a tensor that the rank holds."""
        return tensor.narrow(dim, self.start, self.length)


def spans_of(rank: int, ranks: int, length: int, load_balance: bool) -> list[Span]:
    """List the spans that ``rank`` holds, where every rank holds ``length`` positions."""
    if not load_balance:
        return [Span(0, rank * length, length)]
    half = length // 2
    return [Span(0, rank * half, half), Span(half, (2 * ranks - 1 - rank) * half, half)]


def split_sequence(
    tensor: Tensor,
    group: dist.ProcessGroup | None = None,
    dim: int = 1,
    *,
    load_balance: bool = False,
) -> Tensor:
    """Return this rank's positions of ``tensor``, which every rank of the group has whole.

    Nothing is sent. It is differentiable: the whole sequence gets the gradient of this rank's rows
    alone; :func:`sum_gradients` adds up those of all ranks.

    Args:
        tensor: of any shape: hidden states, targets, a padding mask.
        group: over which the sequence is spread; the default group if None.
        dim: dimension of the sequence; its size is a multiple of the number of ranks, and of twice
            that number with ``load_balance``. Pad it, and mask the padding.
        load_balance: rank r of n gets slices r and 2n - 1 - r of 2n, rather than slice r of n:
            under a causal mask all ranks then have as much to do.

    Returns:
        A tensor with ``size / n`` entries in ``dim``; a view without ``load_balance``.

    Raises:
        ValueError: the size of ``dim`` is not such a multiple.
        IndexError: ``dim`` does not exist.

    Source: the order with load balance: Llama Team, The Llama 3 Herd of Models, arXiv:2407.21783,
    section 3.3.2.
    """
    checks.check_tensor("split_sequence", "tensor", tensor)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    size = tensor.shape[dim]
    multiple = 2 * ranks if load_balance else ranks
    if size % multiple:
        raise ValueError(
            f"split_sequence(): expected the size of dimension {dim} of 'tensor' to be a multiple "
            f"of {multiple}, for {ranks} ranks with load_balance={load_balance}, but got shape "
            f"{tuple(tensor.shape)}"
        )
    spans = spans_of(rank, ranks, size // ranks, load_balance)
    parts = [tensor.narrow(dim, span.position, span.length) for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def join_sequence(
    tensor: Tensor,
    group: dist.ProcessGroup | None = None,
    dim: int = 1,
    *,
    load_balance: bool = False,
) -> Tensor:
    """Gather the whole sequence on every rank: the inverse of :func:`split_sequence`.

    It has no gradient: a loss is computed on each rank's own rows, and losses are added up.

    Args:
        tensor: what this rank holds; of the same shape on every rank.
        group, dim, load_balance: as for :func:`split_sequence`.

    Raises:
        ValueError: on every rank, if shapes or dtypes differ, or an odd size has ``load_balance``.
        RuntimeError: ``tensor`` requires a gradient, outside ``torch.no_grad()``.
    """
    function = "join_sequence"

    def describe() -> dict[str, object]:
        checks.check_tensor(function, "tensor", tensor)
        if load_balance and tensor.shape[dim] % 2:
            raise ValueError(
                f"{function}(): expected the size of dimension {dim} of 'tensor' to be even with "
                f"load_balance=True, but got shape {tuple(tensor.shape)}"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{function}(): has no gradient; compute the loss on each rank's own rows, or call "
                f"it under torch.no_grad() or on tensor.detach()"
            )
        return {
            "the shape of 'tensor'": tuple(tensor.shape),
            "its dtype": tensor.dtype,
            "'dim'": dim,
            "'load_balance'": load_balance,
        }

    agree(function, group, describe)
    ranks, length = dist.get_world_size(group), tensor.shape[dim]
    held = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(held, tensor.contiguous(), group)
    pieces = {
        span.position: span.of(part, dim)
        for rank, part in enumerate(held)
        for span in spans_of(rank, ranks, length, load_balance)
    }
    return torch.cat([pieces[position] for position in sorted(pieces)], dim)
