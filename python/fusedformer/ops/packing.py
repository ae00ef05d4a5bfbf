"""Move rows between padded and packed batches: registration, autograd, choice of backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.backend import (
    INTERPRETER_IS_ON,
    TRITON_IS_INSTALLED,
    chosen_backend,
    kernels_run_on,
)
from fusedformer._internal.tracing import is_eager, is_traced
from fusedformer.ops._registered import registered


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor, *, holes: bool, unused: bool) -> Tensor:
    """Gather ``x[index]`` of rows ``[N, D]``, 0 where the index is -1.

    Args:
        x: ``[N, D]``.
        index: int64 ``[M]``; no row but -1 occurs twice.
        inverse: int64 ``[N]``: where each row of ``x`` goes, -1 if nowhere.
        holes: whether there may be -1 in ``index``.
        unused: whether there may be -1 in ``inverse``.
    """
    if chosen_backend(x) == "triton":
        result: Tensor = _gather_rows(x, index, inverse)
        return result
    if not holes or not index.shape[0]:
        return x.index_select(0, index)
    if not unused:
        return x.new_zeros(index.shape[0], x.shape[1]).index_copy(0, inverse, x)
    if x.is_cuda or not checks.has_values(x):  # nothing that depends on data is asked for
        return x.index_select(0, index.clamp(min=0)).masked_fill((index < 0)[:, None], 0.0)
    moved = (index >= 0).nonzero().flatten()
    rows = x.index_select(0, index.index_select(0, moved))
    return x.new_zeros(index.shape[0], x.shape[1]).index_copy(0, moved, rows)


class TokenPlaces(NamedTuple):
    """Where the tokens of a padded batch go; see :class:`fusedformer.functional.Packing`."""

    starts: Tensor
    starts_q: Tensor
    starts_k: Tensor
    indices: Tensor
    inverse: Tensor


class TokenMask(NamedTuple):
    """Which tokens of a padded batch are real, as kernels read it, or by ATen."""

    mask: Tensor  # boolean [batch, length]
    is_padding: bool  # whether True is padding: for kernels alone
    by_kernels: bool

    @staticmethod
    def of(mask: Tensor, is_padding: bool = False) -> TokenMask:
        """Look at who is to read a mask."""
        eager = type(mask) is Tensor and not is_traced() and is_eager()
        if eager and mask.numel() and kernels_run_on(mask):
            return TokenMask(mask, is_padding, True)
        return TokenMask(~mask if is_padding else mask, False, False)

    def counts(self) -> Tensor:
        """Count the real tokens of each sequence."""
        if not self.by_kernels:
            return self.mask.sum(1)
        from fusedformer_kernels.rows.packing import token_counts

        return token_counts(self.mask, self.is_padding)


def token_places(
    tokens: TokenMask, rows: int, *, tail: bool, counts: Tensor | None = None
) -> TokenPlaces:
    """Find the places of the real tokens, in ``rows`` rows.

    ``tail`` says that there may be rows behind the last token. ``counts`` are those of ``tokens``,
    if they were asked for already. Nothing is waited for.
    """
    keep = tokens.mask
    if tokens.by_kernels:
        from fusedformer_kernels.rows.packing import token_places as launch

        counts = tokens.counts() if counts is None else counts
        starts, queries, keys, indices, inverse = launch(
            keep, counts, rows, tail, tokens.is_padding
        )
    else:
        flat = keep.flatten()
        starts = starts_of(keep.sum(1) if counts is None else counts)
        inverse = torch.where(flat, flat.cumsum(0) - 1, -1)
        if rows != flat.shape[0]:
            indices = torch.nonzero_static(flat, size=rows, fill_value=-1).flatten()
        else:  # which needs no operator whose size could depend on values
            positions = torch.arange(rows, device=keep.device)
            indices = positions.new_full((rows + 1,), -1)  # padding goes to the last entry
            indices = indices.scatter(0, torch.where(flat, inverse, rows), positions)[:rows]
        queries = keys = None
        if tail:
            end = starts.new_full((1,), rows)
            queries = torch.cat((starts, end, end))
            keys = torch.cat((starts, starts[-1:], end))
    starts = shared_by_layers(starts)
    if queries is None or keys is None:
        return TokenPlaces(starts, starts, starts, indices, inverse)
    queries, keys = shared_by_layers(queries), shared_by_layers(keys)
    return TokenPlaces(starts, queries, keys, indices, inverse)


def starts_of(counts: Tensor) -> Tensor:
    """Add up the lengths of sequences to where each begins and ends."""
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def shared_by_layers(starts: Tensor) -> Tensor:
    """Promise that ``starts`` of sequences never change, so that kernels plan their work once.

    Starts that a CUDA graph makes change with each replay, and share plans within the graph alone.
    Starts made in code that torch.compile traces share none: there is no tensor yet to remember.
    """
    kernels_may_run = TRITON_IS_INSTALLED and (starts.is_cuda or INTERPRETER_IS_ON)
    if kernels_may_run and not torch.compiler.is_compiling():
        from fusedformer_kernels.attention.schedule import share

        share(starts)
    return starts


@registered("gather_rows")
def _gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    from fusedformer_kernels.rows.gather import gather_rows

    return gather_rows(x, index)


@_gather_rows.register_fake
def _gather_rows_fake(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return _gather_rows(grad, inverse, index), None, None


_gather_rows.register_autograd(_backward, setup_context=_save)
