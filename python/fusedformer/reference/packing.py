"""Define packing: the rows of real tokens of a padded batch."""

from __future__ import annotations

from torch import Tensor


def pack(input: Tensor, keep: Tensor) -> Tensor:
    """Take the real rows ``[total, *]`` of ``[batch, length, *]``, by ``keep [batch, length]``."""
    return input[keep]


def unpack(input: Tensor, keep: Tensor) -> Tensor:
    """Spread ``[total, *]`` over ``[batch, length, *]``, with zeros where ``keep`` is False."""
    output = input.new_zeros(*keep.shape, *input.shape[1:])
    return output.index_put((keep,), input)
