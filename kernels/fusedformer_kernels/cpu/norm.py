"""Call the compiled norms of rows, with the sum before them; forward alone."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fusedformer_kernels.cpu import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Norm(ctypes.Structure):
    """What one call is about; the same as in norm.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "total", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("eps", ctypes.c_float),
        *((n, ctypes.c_int32) for n in ("dtype", "are_parameters_float", "is_rms", "threads")),
    )


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
    out = torch.empty_like(x)
    total = torch.empty_like(x) if wants_sum and residual is not None else None
    parameter = bias if weight is None else weight
    call = _Norm(
        x.data_ptr(),
        *(None if t is None else t.data_ptr() for t in (residual, weight, bias, total)),
        out.data_ptr(), x.numel() // columns, columns, eps, DTYPES[x.dtype],
        parameter is not None and parameter.dtype is torch.float32, is_rms,
        torch.get_num_threads(),
    )  # fmt: skip
    return (out, total) if _function(library)(ctypes.byref(call)) else None


@functools.cache
def _function(library: ctypes.CDLL) -> Any:
    return library.fusedformer_norm
