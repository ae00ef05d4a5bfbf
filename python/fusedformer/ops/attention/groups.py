"""Batches of packed sequences of near lengths, for ATen, which has no attention of packed ones.

Each call that threads share waits for the slowest of them, for long where other processes want the
same cores. So sequences are padded to the longest of a group, as long as the scores that this adds
take less time than the calls of another group would.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer._internal.tracing import is_eager
from fusedformer.ops._registered import plain_apply
from fusedformer.ops.attention.terms import AttentionTerms

# Scores of one head that are computed in the time of a group's calls, with some waiting.
_WORTH_A_GROUP = 2**19


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
    asked = 0  # scores within the lengths of the last group's members
    for pair, run in itertools.groupby(longest_first, key=pairs.__getitem__):
        members = tuple(run)
        own = pair[0] * pair[1] * len(members)
        if found and asked and own and may_pad:
            queries, keys = max(found[-1].queries, pair[0]), found[-1].keys
            joint = (*found[-1].members, *members)
            padding = queries * keys * len(joint) - asked - own
            if padding * heads <= _WORTH_A_GROUP:
                found[-1] = Group(joint, queries, keys, is_padded=True)
                asked += own
                continue
        found.append(Group(members, *pair, is_padded=False))
        asked = own
    return tuple(found)


def stay_aligned(
    terms: AttentionTerms, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]
) -> bool:
    """Tell whether padding leaves the first or last query where it is beside its keys."""
    # Ends that are aligned stay so if all queries and keys of a sequence are as many.
    same = all(q == k or not (q and k) for q, k in zip(lengths_q, lengths_k, strict=True))
    return not terms.align_end or (same and terms.key_lengths is None)


class Batches(NamedTuple):
    """Where heads of packed rows go in the batches of their groups, and back."""

    places: Tensor  # int64 [rows of all batches]: which of the packed heads each takes
    rows: Tensor  # int64 [packed rows * heads]: which row of the batches each head is

    def batched(self, x: Tensor) -> Tensor:
        """Return the rows ``[n, dim]`` of all batches, of packed ``x`` ``[rows, heads, dim]``."""
        if not (is_eager() and x.requires_grad and torch.is_grad_enabled()):
            return _heads_of(x).index_select(0, self.places)
        found: Tensor = _batched(x, *self)
        return found

    def packed(self, x: Tensor, heads: int) -> Tensor:
        """Undo :meth:`batched`; what stands behind the end of a sequence is left out."""
        if not (is_eager() and x.requires_grad and torch.is_grad_enabled()):
            found = x.index_select(0, self.rows)
        else:
            found = _packed(x, self.rows)
        return torch.unflatten(found, 0, (-1, heads))


@lru_cache(maxsize=16)
def batches_of(
    lengths: tuple[int, ...],
    groups: tuple[Group, ...],
    longest: tuple[int, ...],
    heads: int,
    apart: int,
    device: torch.device,
) -> Batches:
    """Place sequences of ``lengths``; those of a group are as long as its ``longest``.

    A batch is ``[sequences, heads, length]``. Rows behind the end of a sequence take its last row,
    so that nothing but its own is read. The first heads of two tokens are ``apart`` heads, see
    :func:`heads_apart`. The result is kept for the next layer.
    """
    order = [i for group in groups for i in group.members]
    most = [n for group, n in zip(groups, longest, strict=True) for _ in group.members]
    begins = list(itertools.accumulate(lengths, initial=0))
    given = [[begins[i] for i in order], [lengths[i] for i in order], most]
    with torch.inference_mode(False):  # others may save them for a backward
        # A column for each head of a sequence.
        begin, own, padded = torch.tensor(given, device="cpu").repeat_interleave(heads, 1)
        plane = torch.repeat_interleave(padded)
        step = torch.arange(len(plane), device="cpu") - (padded.cumsum(0) - padded)[plane]
        token, head = begin[plane] + step.minimum(own[plane] - 1), plane % heads
        real = (step < own[plane]).nonzero().flatten()
        rows = torch.empty_like(real).scatter_(0, (token * heads + head)[real], real)
        return Batches((token * apart + head).to(device), rows.to(device))


def heads_apart(x: Tensor) -> int:
    """Return how many heads of ``x`` ``[rows, heads, dim]``, in memory, are from row to row."""
    dim = x.shape[2]
    is_view = is_eager() and x.stride()[1:] == (dim, 1) and x.stride(0) % dim == 0 and len(x) > 0
    return x.stride(0) // dim if is_view else x.shape[1]


def _heads_of(x: Tensor) -> Tensor:
    """View all that lies between the first head of ``x`` and its last as rows."""
    apart, dim = heads_apart(x), x.shape[2]
    if apart == x.shape[1]:
        return x.flatten(0, 1)
    return x.detach().as_strided(((len(x) - 1) * apart + x.shape[1], dim), (dim, 1))


class _Batched(torch.autograd.Function):
    """Each packed row has the gradient of one row: others do not influence what is packed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.heads = x.shape[1]
        return _heads_of(x).index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        found = grad.index_select(0, rows)
        return found.view(-1, ctx.heads, found.shape[1]), None, None


class _Packed(torch.autograd.Function):
    """The gradient is 0 in rows that are left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_copy(0, rows, grad), None


_batched, _packed = plain_apply(_Batched), plain_apply(_Packed)
