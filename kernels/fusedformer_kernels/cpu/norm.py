"""Call the compiled norms of rows, with the sum before them; forward alone."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fusedformer_kernels.cpu import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    columns: int,
    eps: float,
    *,
    is_rms: bool,
    wants_sum: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """(norm, sum) of rows of ``columns`` elements; None where nothing here computes them.

    All tensors are contiguous and not empty. ``x`` and ``residual`` have one of :data:`DTYPES`,
    ``weight`` and ``bias`` the same or both float32. The sum is None unless there is one and it is
    wanted.
    """
    library = build.library()
    if library is None:
        return None
    out, total = torch.empty_like(x), None
    if wants_sum and residual is not None:
        total = torch.empty_like(x)
    parameter = bias if weight is None else weight
    is_known = _function(library)(
        DTYPES[x.dtype], parameter is not None and parameter.dtype is torch.float32, is_rms,
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if weight is None else weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if total is None else total.data_ptr(),
        out.data_ptr(), x.numel() // columns, columns, eps, torch.get_num_threads(),
    )  # fmt: skip
    return (out, total) if is_known else None


@functools.cache
def _function(library: ctypes.CDLL) -> Any:
    norm = library.fusedformer_norm
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    norm.argtypes = [*[number] * 3, *[pointer] * 6, *[size] * 2, ctypes.c_float, number]
    return norm
