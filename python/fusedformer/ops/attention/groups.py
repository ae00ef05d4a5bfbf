"""Batches of packed sequences of near lengths, for ATen, which has no attention of packed ones.

Each call that threads share waits for the slowest of them, for long where other processes want the
same cores. So sequences are padded to the longest of a group, as long as the scores that this adds
take less time than the calls of another group would.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer._internal.tracing import is_eager
from fusedformer.ops._registered import plain_apply

# Scores of one head that are computed in the time of a group's calls, with some waiting.
_WORTH_A_GROUP = 2**18


class Group(NamedTuple):
    """Sequences that are computed as one batch, and their greatest lengths."""

    members: tuple[int, ...]
    queries: int
    keys: int
    is_padded: bool


@lru_cache(maxsize=256)
def groups_of(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], heads: int, *, may_pad: bool
) -> tuple[Group, ...]:
    """Group all sequences; without ``may_pad`` only those of equal lengths.

    A sequence without queries or keys is not padded either. The result is kept for the next layer.
    """
    pairs = list(zip(lengths_q, lengths_k, strict=True))
    longest_first = sorted(range(len(pairs)), key=lambda i: pairs[i][::-1], reverse=True)
    found: list[Group] = []
    open_group = Group((), 0, 0, False)
    asked = 0  # scores within the lengths of the open group's members
    for i in longest_first:
        queries, keys = (max(pair) for pair in zip(open_group[1:3], pairs[i], strict=True))
        scores = queries * keys * (len(open_group.members) + 1)
        own = pairs[i][0] * pairs[i][1]
        padding = scores - asked - own
        fits = padding * heads <= _WORTH_A_GROUP and may_pad and own > 0
        if open_group.members and not fits and pairs[i] != pairs[open_group.members[-1]]:
            found.append(open_group)
            open_group, asked, padding = Group((), 0, 0, False), 0, 0
            queries, keys = pairs[i]
        open_group = Group((*open_group.members, i), queries, keys, padding > 0)
        asked += own
    return (*found, open_group) if pairs else ()


class Batches(NamedTuple):
    """Where the rows of packed sequences go in the batches of their groups, and back."""

    places: Tensor  # int64 [rows of all batches]: the packed row that each takes
    rows: Tensor  # int64 [packed rows]: which row of the batches each is

    @staticmethod
    def of(
        starts: Tensor, lengths: list[int], groups: tuple[Group, ...], longest: list[int]
    ) -> Batches:
        """Place sequences that begin at ``starts``; those of a group are as long as its longest.

        Rows behind the end of a sequence take its last row, so that nothing but its own is read.
        """
        order = [(i, most) for group, most in zip(groups, longest, strict=True) for i in group[0]]
        device = starts.device
        members, padded = torch.tensor(order, device=device).unbind(1)
        own = torch.tensor(lengths, device=device)[members]
        sequence = torch.repeat_interleave(padded)
        step = torch.arange(len(sequence), device=device) - (padded.cumsum(0) - padded)[sequence]
        places = starts.long()[members][sequence] + step.minimum(own[sequence] - 1)
        real = (step < own[sequence]).nonzero().flatten()
        return Batches(places, torch.empty_like(real).scatter_(0, places[real], real))

    def batched(self, x: Tensor) -> Tensor:
        """Return the rows of all batches, of packed ``x`` ``[rows, heads, dim]``."""
        if not (is_eager() and x.requires_grad and torch.is_grad_enabled()):
            return x.index_select(0, self.places)
        found: Tensor = _batched(x, *self)
        return found

    def packed(self, x: Tensor) -> Tensor:
        """Undo :meth:`batched`; what stands behind the end of a sequence is left out."""
        if not (is_eager() and x.requires_grad and torch.is_grad_enabled()):
            return x.index_select(0, self.rows)
        found: Tensor = _packed(x, *self)
        return found


class _Batched(torch.autograd.Function):
    """Each packed row has the gradient of one row: others do not influence what is packed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Packed(torch.autograd.Function):
    """The gradient is 0 in rows that are left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(places, rows)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        places, rows = ctx.saved_tensors
        found = grad.new_zeros(places.shape[0], *grad.shape[1:])
        return found.index_copy(0, rows, grad), None, None


_batched, _packed = plain_apply(_Batched), plain_apply(_Packed)
