"""Selections: the rows of a packed batch whose output is wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedformer import ops
from fusedformer._internal import checks
from fusedformer.errors import BadTypeError, BadValueError
from fusedformer.functional.packing import Packing, packing_from_counts, with_empty_tail


class Selection(NamedTuple):
    """Packed rows that the last layer computes, in the order of their sequences.

    Attributes:
        rows: int64 ``[rows]``: the index of each in the packed rows, -1 for padding.
        inverse: int64 ``[total]``: the place of each packed row in ``rows``, -1 for rows that are
            not selected; None if a row may be selected twice.
        cu_seqlens: int32: where each sequence's selected rows begin; one with each sequence of
            ``packing.cu_seqlens_k``.
        max_seqlen: the largest number of selected rows of a sequence.
        shape: of the output, without the width.
        places: int64: the place in ``rows`` of each row of the output, -1 for padding.
        origins: int64 ``[rows]``: the inverse of ``places``. Both are None if ``rows`` are in the
            order of the output.
    """

    rows: Tensor
    inverse: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    shape: tuple[int, ...]
    places: Tensor | None = None
    origins: Tensor | None = None

    def take(self, packed: Tensor) -> Tensor:
        """Take the selected rows ``[rows, width]`` of ``[total, width]``; differentiable."""
        if self.inverse is None:
            found = packed.index_select(0, self.rows.clamp(min=0))
            return found.masked_fill((self.rows < 0)[:, None], 0.0)
        return ops.gather_rows(packed, self.rows, self.inverse, holes=False, unused=True)

    def result(self, rows: Tensor) -> Tensor:
        """Return the output ``[*shape, width]`` of selected rows, with zeros for padding."""
        if self.inverse is None:
            rows = rows.masked_fill((self.rows < 0)[:, None], 0.0)
        elif self.places is not None and self.origins is not None:
            rows = ops.gather_rows(rows, self.places, self.origins, holes=True, unused=False)
        return rows.reshape(*self.shape, rows.shape[-1])


def check_output_rows(function: str, output_rows: Tensor, batch: int, length: int) -> None:
    """Check that ``output_rows`` is boolean ``[batch, length]`` or columns ``[batch, rows]``."""
    name = "output_rows"
    checks.check_tensor(function, name, output_rows)
    if output_rows.dtype == torch.bool:
        checks.check_shape(function, name, output_rows, (batch, length), "batch, length")
    elif output_rows.dtype != torch.int64:
        raise BadTypeError(
            f"{function}(): expected '{name}' to be boolean [batch, length] or int64 "
            f"[batch, rows], but got {output_rows.dtype}"
        )
    elif output_rows.dim() != 2 or output_rows.shape[0] != batch:
        raise BadValueError(
            f"{function}(): expected '{name}' to have shape [{batch}, rows] (columns of each "
            f"sequence), but got {tuple(output_rows.shape)}"
        )
    elif (
        output_rows.device.type == "cpu" and checks.has_values(output_rows) and output_rows.numel()
    ):
        low, high = int(output_rows.min()), int(output_rows.max())
        if low < 0 or high >= length:
            raise IndexError(
                f"{function}(): expected '{name}' to be columns from 0 to {length - 1}, "
                f"but got {low if low < 0 else high}"
            )


def packing_and_selection(
    keep: Tensor, output_rows: Tensor, *, static_shapes: bool, multiple_of: int
) -> tuple[Packing, Selection]:
    """Pack a batch, and select the rows in ``output_rows``.

    This waits for the device once; with columns and static shapes never.
    """
    if output_rows.dtype != torch.bool:
        packing = Packing.of(keep, static_shapes=static_shapes, multiple_of=multiple_of)
        return packing, select_columns(packing, output_rows)
    tokens = ops.TokenMask.of(keep)
    wanted, counts = output_rows.flatten(), tokens.counts()
    found = output_rows & keep
    found_counts = found.sum(1)
    numbers = [output_rows.sum(), found_counts.sum(), counts.sum()]
    if keep.shape[0]:
        numbers += [found_counts.max(), counts.max()]
    asked, rows, total, *most = torch.stack(numbers).tolist()
    longest_found, longest = most or (0, 0)
    packing = packing_from_counts(tokens, counts, total, longest, multiple_of)
    flat = found.flatten()
    rank = flat.cumsum(0) - 1
    positions = torch.nonzero_static(flat, size=rows).flatten()
    index = packing.inverse[positions]
    chosen = flat[packing.indices] & (packing.indices >= 0)
    selection = Selection(
        index,
        torch.where(chosen, chosen.cumsum(0) - 1, -1),
        _with_tail_of(ops.shared_by_layers(ops.starts_of(found_counts)), packing),
        longest_found,
        (asked,),
    )
    if asked == rows:
        return packing, selection
    asked_positions = torch.nonzero_static(wanted, size=asked).flatten()
    places = torch.where(flat, rank, -1)[asked_positions]
    origins = (wanted.cumsum(0) - 1)[positions]
    return packing, selection._replace(places=places, origins=origins)


def select_columns(packing: Packing, columns: Tensor) -> Selection:
    """Select ``columns`` ``[batch, rows]`` of the padded batch."""
    batch, each = columns.shape
    firsts = torch.arange(batch, device=columns.device)[:, None] * packing.length
    index = packing.inverse[(firsts + columns).flatten()]
    starts = torch.arange(batch + 1, device=columns.device, dtype=torch.int32) * each
    return Selection(index, None, _with_tail_of(starts, packing), each, (batch, each))


def _with_tail_of(starts: Tensor, packing: Packing) -> Tensor:
    """Append two empty sequences if the packing has a tail, which counts as two sequences."""
    return with_empty_tail(starts) if packing.has_tail else starts
