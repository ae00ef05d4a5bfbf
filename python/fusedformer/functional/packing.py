"""Pack padded batches: rows of real tokens alone, one sequence after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedformer import ops
from fusedformer._internal import checks
from fusedformer._internal.tracing import is_traced, is_vmapped
from fusedformer.errors import BadTypeError, BadValueError


class Packing(NamedTuple):
    """Where the tokens of a padded batch go; made by :meth:`of`.

    Attributes:
        cu_seqlens: int32 ``[batch + 1]``: where each sequence begins and ends.
        max_seqlen: length of the longest sequence, or a bound on it.
        indices: int64 ``[total]``: for each packed row its position in ``[batch * length]``, -1 for
            rows behind the last token.
        inverse: int64 ``[batch * length]``: for each position its packed row, -1 for padding.
        batch: number of sequences.
        length: of the padded batch.
        cu_seqlens_q, cu_seqlens_k: for :func:`varlen_attention`. They are ``cu_seqlens``, and where
            there are rows behind the last token two sequences more: one has these rows as queries
            with no keys, the other as keys with no queries. Attention thus gives them zeros,
            output and gradients, and spends nothing on them.
        has_tail: whether there may be rows behind the last token.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor
    inverse: Tensor
    batch: int
    length: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    has_tail: bool

    @property
    def total(self) -> int:
        """Number of packed rows: of real tokens, and of zeros behind them if there are any."""
        return self.indices.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is known to be padding, so that packing moves nothing."""
        return self.total == self.batch * self.length and not self.has_tail

    @staticmethod
    def of(
        keep: Tensor,
        lengths: Sequence[int] | None = None,
        *,
        static_shapes: bool = False,
        multiple_of: int = 1,
    ) -> Packing:
        """Find the packing of a padded batch: real tokens where ``keep`` is True, in any pattern.

        Args:
            keep: boolean ``[batch, length]``.
            lengths: the number of real tokens of each sequence, where it is known on the host.
                Without it, tensors on a GPU are waited for once.
            static_shapes: packed tensors have ``batch * length`` rows, tokens first and zeros
                behind them. Nothing is waited for, and a CUDA graph can capture it all.
            multiple_of: round the number of packed rows up, with rows of zeros. oneDNN's products
                are a tenth faster on multiples of 16.

        Raises:
            TypeError: ``keep`` is not a boolean tensor.
            ValueError: ``keep`` is not 2-D; not as many ``lengths`` as sequences, or both
                ``lengths`` and ``static_shapes``; ``multiple_of`` is not positive.
            RuntimeError: neither is given while ``keep`` is traced (``torch.jit.trace``,
                ``make_fx``), or mapped by ``torch.vmap``: what would be packed is an example's.
        """
        _check_keep(keep, lengths, static_shapes)
        if multiple_of < 1:
            raise BadValueError(
                f"Packing.of(): expected 'multiple_of' to be positive, but got {multiple_of}"
            )
        return packing_of_mask(keep, lengths, static_shapes, multiple_of)


def _check_keep(keep: Tensor, lengths: Sequence[int] | None, static_shapes: bool) -> None:
    function = "Packing.of"
    checks.check_tensor(function, "keep", keep)
    if keep.dtype != torch.bool:
        raise BadTypeError(
            f"{function}(): expected 'keep' to be boolean (True = real), but got {keep.dtype}"
        )
    if keep.dim() != 2:
        raise BadValueError(
            f"{function}(): expected 'keep' to have shape [batch, length], "
            f"but got {tuple(keep.shape)}"
        )
    if lengths is None:
        return
    if static_shapes:
        raise BadValueError(
            f"{function}(): expected no 'lengths' with static_shapes=True, which does without "
            f"them, but got {len(lengths)}"
        )
    if len(lengths) != keep.shape[0]:
        raise BadValueError(
            f"{function}(): expected 'lengths' to have {keep.shape[0]} entries, one for each "
            f"sequence, but got {len(lengths)}"
        )


def _check_known(keep: Tensor) -> None:
    if torch.compiler.is_compiling():  # which breaks the graph
        return
    if is_traced() or is_vmapped(keep):
        raise RuntimeError(
            "Packing.of(): expected 'static_shapes=True' or 'lengths' while 'keep' is traced or "
            "mapped by torch.vmap, where the number of its tokens is an example's"
        )


def packing_of_mask(
    mask: Tensor,
    lengths: Sequence[int] | None,
    static_shapes: bool,
    multiple_of: int,
    *,
    is_padding: bool = False,
) -> Packing:
    """Compute :meth:`Packing.of` a mask that is checked; True may be padding."""
    tokens = ops.TokenMask.of(mask, is_padding)
    if static_shapes:
        rows = mask.shape[0] * mask.shape[1]
        return _packing_of(mask, ops.token_places(tokens, rows, tail=True), rows, True)
    counts = None
    if lengths is not None:
        total, longest = sum(lengths), max(lengths, default=0)
        return packing_from_counts(tokens, None, total, longest, multiple_of)
    _check_known(mask)
    total = longest = 0
    if mask.shape[0]:
        counts = tokens.counts()
        if torch.compiler.is_compiling():  # which would compile again for each list of lengths
            total, longest = torch.stack((counts.sum(), counts.max())).tolist()
        else:  # the host adds up what it waits for
            found = counts.tolist()
            total, longest = sum(found), max(found)
    return packing_from_counts(tokens, counts, total, longest, multiple_of)


def packing_from_counts(
    tokens: ops.TokenMask, counts: Tensor | None, total: int, longest: int, multiple_of: int
) -> Packing:
    """Make a packing of ``tokens`` from numbers that the host knows."""
    rows = -(-total // multiple_of) * multiple_of
    tail = rows != total
    if total == tokens.mask.numel() and not tail and not torch.compiler.is_compiling():
        return whole_packing(*_sizes(tokens.mask), tokens.mask.device)
    longest = max(longest, rows - total)
    places = ops.token_places(tokens, rows, tail=tail, counts=counts)
    return _packing_of(tokens.mask, places, longest, tail)


def _packing_of(mask: Tensor, places: ops.TokenPlaces, longest: int, tail: bool) -> Packing:
    starts, starts_q, starts_k, indices, inverse = places
    sizes = _sizes(mask)
    return Packing(starts, longest, indices, inverse, *sizes, starts_q, starts_k, tail)


def whole_packing(batch: int, length: int, device: torch.device) -> Packing:
    """Make the packing of a batch without padding; sizes may be symbols of a compiler."""
    positions = torch.arange(batch * length, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    starts = ops.shared_by_layers(starts)
    return Packing(starts, length, positions, positions, batch, length, starts, starts, False)


def with_empty_tail(starts: Tensor) -> Tensor:
    """Append two empty sequences to ``starts``, for a tensor without rows behind its last token.

    They stand beside the two that the other tensor of an attention has for its tail.
    """
    return torch.cat((starts, starts[-1:], starts[-1:]))


def _sizes(mask: Tensor) -> tuple[int, int]:
    batch, length = mask.shape
    return batch, length


def pack(input: Tensor, packing: Packing) -> Tensor:
    """Pack the real tokens of a padded batch, one sequence after another; differentiable.

    Args:
        input: ``[batch, length, *]``.
        packing: of a batch of that size.

    Returns:
        ``[total, *]``, contiguous; zeros in rows behind the last token. A view of ``input`` where
        nothing is padding.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: ``input`` is not of the packing's batch and length, or on another device.

    Source: Zeng et al., Boosting Distributed Training Performance of the Unpadded BERT Model,
    arXiv:2208.08124.
    """
    _check("pack", input, packing, (packing.batch, packing.length), "batch, length")
    rows = input.flatten(0, 1)
    if packing.is_whole:
        return rows.contiguous()
    packed = ops.gather_rows(
        rows.flatten(1), packing.indices, packing.inverse, holes=packing.has_tail, unused=True
    )
    return packed.reshape(packing.total, *input.shape[2:])


def unpack(input: Tensor, packing: Packing) -> Tensor:
    """Undo :func:`pack`, with zeros where there is no token; differentiable.

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
    if packing.is_whole:
        return torch.unflatten(input.contiguous(), 0, (packing.batch, packing.length))
    rows = ops.gather_rows(
        input.flatten(1),
        packing.inverse,
        packing.indices,
        holes=True,
        unused=packing.has_tail,
    )
    return rows.reshape(packing.batch, packing.length, *input.shape[1:])


def _check(
    function: str, input: Tensor, packing: Packing, leading: tuple[int, ...], of: str
) -> None:
    checks.check_tensor(function, "input", input)
    checks.check_floating(function, "input", input)
    if tuple(input.shape[: len(leading)]) != leading or input.dim() <= len(leading):
        raise BadValueError(
            f"{function}(): expected 'input' to have shape {leading} ({of}) and more, "
            f"but got {tuple(input.shape)}"
        )
    checks.check_same_device(function, {"input": input, "packing": packing.indices})
