"""Describe tensors that kernels copy box by box (TMA), as launches pass them.

Triton encodes a descriptor for each launch, from an address, sizes and strides. :class:`Boxes` has
what its launcher asks for, so a cached launch passes it as it is, and a plan passes
:meth:`Boxes.at` the address of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_UNIT = 16  # bytes: addresses and strides are multiples of it,
_MOST_BYTES = 2**40  # and strides are less than this


class Address(int):
    """Says where a tensor begins, as Triton's launcher asks a tensor."""

    def data_ptr(self) -> int:
        """Return the address."""
        return int(self)


@dataclass(slots=True)
class Boxes:
    """Describes a tensor and the box of it that a copy takes; outside of it are zeros."""

    base: Any  # a tensor; of a plan an address
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    block_shape: tuple[int, ...]
    layout: Any  # Gluon's, of a box in shared memory
    padding: str = "zero"
    round_f32_to_tf32: bool = False

    def kind(self) -> tuple[Any, ...]:
        """Return what Triton compiles a kernel anew for."""
        return self.base.dtype, self.block_shape, repr(self.layout)

    def at(self, base: Any) -> Boxes:
        """Describe the same elsewhere: at an address, or at a plan's place."""
        where = Address(base) if type(base) is int else base
        return Boxes(where, self.shape, self.strides, self.block_shape, self.layout)

    def descriptor(self) -> Any:
        """Make Gluon's descriptor, which Triton's own way to a kernel wants."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        parts = (list(part) for part in (self.shape, self.strides, self.block_shape))
        return TensorDescriptor(self.base, *parts, self.layout)


def can_be_boxed(tensor: Tensor) -> bool:
    """Tell whether TMA can copy boxes of a tensor [batch, heads, rows, dim]."""
    order = _order(tensor)
    sizes, strides = [tensor.shape[n] for n in order], _strides(tensor, order)
    unit = _UNIT // tensor.element_size()
    return (
        all((*sizes, *strides))
        and strides[3] == 1
        and not any(stride % unit for stride in strides[:3])
        and strides[0] * tensor.element_size() < _MOST_BYTES
        and all(
            outer % inner == 0 and outer >= inner * size
            for outer, inner, size in zip(strides[:3], strides[1:], sizes[1:], strict=True)
        )
        and (tensor.is_meta or tensor.data_ptr() % _UNIT == 0)
    )


def boxes_of(tensor: Tensor, rows: int, columns: int, layout: Any) -> Boxes:
    """Describe boxes [rows, columns] of a tensor [batch, heads, rows, dim].

    They have four dimensions, in the order of the tensor's strides, as the driver's documentation
    has them: where heads lie within rows the two change places.
    """
    order = _order(tensor)
    return Boxes(
        tensor, tuple([tensor.shape[n] for n in order]), tuple(_strides(tensor, order)),
        tuple([(1, 1, rows, columns)[n] for n in order]), layout,
    )  # fmt: skip


def _order(tensor: Tensor) -> tuple[int, ...]:
    heads_within = tensor.shape[1] > 1 and tensor.stride(1) < tensor.stride(2)
    return (0, 2, 1, 3) if heads_within else (0, 1, 2, 3)


def _strides(tensor: Tensor, order: tuple[int, ...]) -> list[int]:
    """Return the strides in that order, where a size is 1 those of rows without gaps."""
    strides = [tensor.stride(n) for n in order]
    for n in (2, 1, 0):
        if tensor.shape[order[n]] == 1:
            strides[n] = tensor.shape[order[n + 1]] * strides[n + 1]
    return strides
