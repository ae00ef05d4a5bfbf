"""Padded batches as packed rows: the definition."""

from __future__ import annotations

from torch import Tensor


def pack(input: Tensor, keep: Tensor) -> Tensor:
    """``[total, *]``: of ``[batch, length, *]`` what is real, by ``keep [batch, length]``."""
    return input[keep]


def unpack(input: Tensor, keep: Tensor) -> Tensor:
    """``[total, *]`` back to ``[batch, length, *]``, with zeros where ``keep`` is False."""
    output = input.new_zeros(*keep.shape, *input.shape[1:])
    return output.index_put((keep,), input)
