"""Padded batches as packed rows: only real tokens, one sequence after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedformer import _checks, ops


class Packing(NamedTuple):
    """Where the tokens of a padded batch go; made by :meth:`of`.

    Attributes:
        cu_seqlens: int32 ``[batch + 1]``: where each sequence begins and ends.
        max_seqlen: length of the longest sequence.
        indices: int64 ``[total]``: for each packed row its position in ``[batch * length]``.
        inverse: int64 ``[batch * length]``: for each position its packed row, -1 for padding.
        batch: number of sequences.
        length: of the padded batch.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor
    inverse: Tensor
    batch: int
    length: int

    @property
    def total(self) -> int:
        """Number of real tokens."""
        return self.indices.shape[0]

    @staticmethod
    def of(keep: Tensor, lengths: Sequence[int] | None = None) -> Packing:
        """The packing of a padded batch with real tokens where ``keep`` is True, in any pattern.

        Args:
            keep: boolean ``[batch, length]``.
            lengths: the number of real tokens of each sequence, where it is known on the host.
                Without it, tensors on a GPU are waited for once.

        Raises:
            TypeError: ``keep`` is not a boolean tensor.
            ValueError: ``keep`` is not 2-D; not as many ``lengths`` as sequences.
        """
        function = "Packing.of"
        _checks.check_tensor(function, "keep", keep)
        if keep.dtype != torch.bool:
            raise TypeError(
                f"{function}(): expected 'keep' to be boolean (True = real), but got {keep.dtype}"
            )
        if keep.dim() != 2:
            raise ValueError(
                f"{function}(): expected 'keep' to have shape [batch, length], "
                f"but got {tuple(keep.shape)}"
            )
        batch, length = keep.shape
        if lengths is not None and len(lengths) != batch:
            raise ValueError(
                f"{function}(): expected 'lengths' to have {batch} entries, one for each "
                f"sequence, but got {len(lengths)}"
            )
        counts = keep.sum(1)
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=keep.device)
        torch.cumsum(counts, 0, out=cu_seqlens[1:])
        if lengths is not None:
            total, longest = sum(lengths), max(lengths, default=0)
        elif batch:
            total, longest = torch.stack((counts.sum(), counts.max())).tolist()
        else:
            total, longest = 0, 0
        flat = keep.flatten()
        indices = torch.nonzero_static(flat, size=total).flatten()
        inverse = torch.where(flat, flat.cumsum(0) - 1, -1)
        return Packing(cu_seqlens, longest, indices, inverse, batch, length)


def pack(input: Tensor, packing: Packing) -> Tensor:
    """The real tokens of a padded batch, one sequence after another; differentiable.

    Args:
        input: ``[batch, length, *]``.
        packing: of a batch of that size.

    Returns:
        ``[total, *]``, contiguous.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: ``input`` is not of the packing's batch and length, or on another device.

    Source: Zeng et al., Boosting Distributed Training Performance of the Unpadded BERT Model,
    arXiv:2208.08124.
    """
    _check("pack", input, packing, (packing.batch, packing.length), "batch, length")
    rows = input.flatten(0, 1)
    packed = ops.gather_rows(rows.flatten(1), packing.indices, packing.inverse)
    return packed.reshape(packing.total, *input.shape[2:])


def unpack(input: Tensor, packing: Packing) -> Tensor:
    """The inverse of :func:`pack`, with zeros where there is no token; differentiable.

    Args:
        input: ``[total, *]``.
        packing: with that many tokens.

    Returns:
        ``[batch, length, *]``, contiguous.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: ``input`` has not as many rows as the packing, or is on another device.
    """
    _check("unpack", input, packing, (packing.total,), "total")
    rows = ops.gather_rows(input.flatten(1), packing.inverse, packing.indices)
    return rows.reshape(packing.batch, packing.length, *input.shape[1:])


def _check(
    function: str, input: Tensor, packing: Packing, leading: tuple[int, ...], of: str
) -> None:
    _checks.check_tensor(function, "input", input)
    _checks.check_floating(function, "input", input)
    if tuple(input.shape[: len(leading)]) != leading or input.dim() <= len(leading):
        raise ValueError(
            f"{function}(): expected 'input' to have shape {leading} ({of}) and more, "
            f"but got {tuple(input.shape)}"
        )
    _checks.check_same_device(function, {"input": input, "packing": packing.indices})
