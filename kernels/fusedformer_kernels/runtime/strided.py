"""Views: tensors of any rank as the 4-D [size_0, size_1, size_2, columns] that kernels read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch

from fusedformer_kernels.runtime.steps import unplanned


def contiguous_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialized, of its shape, device and, unless another is given, dtype; row by row.

    It takes a third of the time of ``torch.empty`` with the same three.
    """
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


@overload
def contiguous_vector(vector: torch.Tensor, size: int | None = None) -> torch.Tensor: ...
@overload
def contiguous_vector(
    vector: torch.Tensor | None, size: int | None = None
) -> torch.Tensor | None: ...
def contiguous_vector(
    vector: torch.Tensor | None, size: int | None = None
) -> torch.Tensor | None:
    """A vector as kernels read it, elements one after another; copied where they do not lie so.

    Raises:
        RuntimeError: it has not ``size`` elements, if that is given: kernels would read past it.
    """
    if vector is None:
        return None
    if size is not None and vector.numel() != size:
        raise RuntimeError(
            f"fusedformer: expected a parameter of {size} elements, one for each column, but got "
            f"shape {tuple(vector.shape)}"
        )
    return contiguous(vector)


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor row by row; what was saved for a backward may come back with other strides."""
    if tensor.is_contiguous():
        return tensor
    unplanned()  # a copy
    return tensor.contiguous()


def collapsed(
    tensors: Sequence[torch.Tensor], *, keep_rows: bool = False
) -> tuple[list[torch.Tensor], bool]:
    """4-D views of equally shaped tensors, neighbouring dimensions merged where all allow it.

    Args:
        tensors: of one shape, any strides (0 too); the last dimension stays the last.
        keep_rows: leave dimension -2 alone, because its index matters to the kernel.

    Returns:
        The views, and whether a copy was needed (only where more than three dimensions are left).
    """
    shape = tensors[0].shape
    if not keep_rows and all(t.is_contiguous() for t in tensors) and tensors[0].numel():
        return [t.view(-1, 1, 1, shape[-1]) for t in tensors], False
    last_free = len(shape) - (2 if keep_rows and len(shape) > 1 else 1)
    groups: list[list[int]] = []
    for dim in (d for d in range(last_free) if shape[d] != 1):
        if groups and all(_merges(t, groups[-1][-1], dim) for t in tensors):
            groups[-1].append(dim)
        else:
            groups.append([dim])
    sizes = [math.prod(shape[dim] for dim in group) for group in groups]
    kept = list(shape[last_free:-1])
    excess = len(sizes) + len(kept) - 3
    if excess > 0:
        sizes = [math.prod(sizes[: excess + 1]), *sizes[excess + 1 :]]
    # Sizes of 1 come last where they may: of the row's number they leave no division to a kernel.
    sizes += [1] * (3 - len(sizes) - len(kept)) + kept + [shape[-1]]
    if excess > 0:
        unplanned()  # copies
    return [t.reshape(sizes) for t in tensors], excess > 0


def _merges(tensor: torch.Tensor, outer: int, inner: int) -> bool:
    return tensor.stride(outer) == tensor.stride(inner) * tensor.shape[inner]


def rows_of(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """``[rows, columns]`` of a tensor whose last dimensions make up ``columns``.

    A view where the rows lie at one stride, else a copy; the columns are contiguous.
    """
    if tensor.dim() == 2 and tensor.shape[1] == columns and tensor.stride(1) == 1:
        return tensor
    try:
        rows = tensor.view(tensor.numel() // columns if columns else 0, columns)
    except RuntimeError:
        unplanned()
        rows = tensor.reshape(-1, columns)
    if rows.stride(-1) == 1 or columns == 1:
        return rows
    unplanned()
    return rows.contiguous()
