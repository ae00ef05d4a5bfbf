"""Some rows of a packed batch: those whose output is asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedformer import ops
from fusedformer._internal import checks
from fusedformer.errors import BadTypeError, BadValueError
from fusedformer.functional.packing import Packing, packing_from_counts, starts_of, with_empty_tail


class Selection(NamedTuple):
    """Packed rows that the last layer computes, in the order of their sequences.

    Attributes:
        rows: int64 ``[rows]``: each one's packed row, -1 for padding that was asked for.
        inverse: int64 ``[total]``, -1 for rows that are not among them; None if a row may be
            among them twice.
        cu_seqlens: int32: where each sequence's rows begin, to go with ``packing.cu_seqlens_k``.
        max_seqlen: the most rows of a sequence.
        shape: of what is returned, without the width.
        places: int64: for each row that is returned its place in ``rows``, -1 for padding.
        origins: int64 ``[rows]``: the inverse of ``places``. Both are None where nothing moves.
    """

    rows: Tensor
    inverse: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    shape: tuple[int, ...]
    places: Tensor | None = None
    origins: Tensor | None = None

    def take(self, packed: Tensor) -> Tensor:
        """``[rows, width]`` of ``[total, width]``, differentiable."""
        if self.inverse is None:
            found = packed.index_select(0, self.rows.clamp(min=0))
            return found.masked_fill((self.rows < 0)[:, None], 0.0)
        return ops.gather_rows(packed, self.rows, self.inverse, holes=False, unused=True)

    def result(self, rows: Tensor) -> Tensor:
        """``[*shape, width]`` of ``[rows, width]``, with zeros for padding."""
        if self.inverse is None:
            rows = rows.masked_fill((self.rows < 0)[:, None], 0.0)
        elif self.places is not None and self.origins is not None:
            rows = ops.gather_rows(rows, self.places, self.origins, holes=True, unused=False)
        return rows.reshape(*self.shape, rows.shape[-1])


def check_output_rows(function: str, output_rows: Tensor, batch: int, length: int) -> None:
    """Raise unless it is boolean ``[batch, length]`` or columns ``[batch, rows]``."""
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
    """The packing of a batch, and the rows of it that ``output_rows`` asks for.

    Both together wait for the device once, with columns and static shapes never.
    """
    if output_rows.dtype != torch.bool:
        packing = Packing.of(keep, static_shapes=static_shapes, multiple_of=multiple_of)
        return packing, select_columns(packing, output_rows)
    wanted, counts = output_rows.flatten(), keep.sum(1)
    found = output_rows & keep
    found_counts = found.sum(1)
    numbers = [output_rows.sum(), found_counts.sum(), counts.sum()]
    if keep.shape[0]:
        numbers += [found_counts.max(), counts.max()]
    asked, rows, total, *most = torch.stack(numbers).tolist()
    longest_found, longest = most or (0, 0)
    packing = packing_from_counts(keep, counts, total, longest, multiple_of)
    flat = found.flatten()
    rank = flat.cumsum(0) - 1
    positions = torch.nonzero_static(flat, size=rows).flatten()
    index = packing.inverse[positions]
    chosen = flat[packing.indices] & (packing.indices >= 0)
    selection = Selection(
        index,
        torch.where(chosen, chosen.cumsum(0) - 1, -1),
        _beside_tail(starts_of(found_counts), packing),
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
    """``columns`` ``[batch, rows]`` of the padded batch."""
    batch, each = columns.shape
    firsts = torch.arange(batch, device=columns.device)[:, None] * packing.length
    index = packing.inverse[(firsts + columns).flatten()]
    starts = torch.arange(batch + 1, device=columns.device, dtype=torch.int32) * each
    return Selection(index, None, _beside_tail(starts, packing), each, (batch, each))


def _beside_tail(starts: Tensor, packing: Packing) -> Tensor:
    """With two empty sequences, if the packing's keys have those of rows that are no tokens."""
    return with_empty_tail(starts) if packing.has_tail else starts
