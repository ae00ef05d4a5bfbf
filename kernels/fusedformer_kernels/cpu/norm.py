"""Call the compiled norms of rows, with the sum before them, and their backward."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fusedformer_kernels.cpu import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def computes(dtype: torch.dtype) -> bool:
    """Tell whether the functions here take tensors of this dtype."""
    library = build.library()
    if library is None or dtype not in DTYPES:
        return False
    return dtype is not torch.float16 or bool(library.fusedformer_has_float16())


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
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(norm, sum) of rows of ``columns`` elements.

    All tensors are contiguous and not empty. ``x`` and ``residual`` have a dtype that
    :func:`computes` knows, ``weight`` and ``bias`` the same or both float32. The sum is None unless
    there is one and it is wanted. What :func:`norm_backward` takes is written to ``statistics``,
    ``[2, rows]`` in float32.
    """
    library = build.loaded()
    out, total = torch.empty_like(x), None
    if wants_sum and residual is not None:
        total = torch.empty_like(x)
    parameter = bias if weight is None else weight
    _function(library)(
        DTYPES[x.dtype], parameter is not None and parameter.dtype is torch.float32, is_rms,
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if weight is None else weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if total is None else total.data_ptr(),
        out.data_ptr(), None if statistics is None else statistics.data_ptr(),
        x.numel() // columns, columns, eps, torch.get_num_threads(),
    )  # fmt: skip
    return out, total


def norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    *,
    is_rms: bool,
    are_parameters_float: bool,
    wants_x: bool,
    wants_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (``x``, weight, bias), those of parameters ``[columns]`` in float64.

    ``x`` is the sum that was normed, ``grad_total`` what comes to it past the norm. All are
    contiguous, as in :func:`norm`, which has written ``statistics``.
    """
    library, rows = build.loaded(), statistics.shape[1]
    columns = x.numel() // rows
    dx = torch.empty_like(x) if wants_x else None
    sums = None
    if wants_parameters:
        blocks = library.fusedformer_norm_blocks(ctypes.c_int64(rows))
        sums = torch.empty(blocks, 2, columns, dtype=torch.float64, device="cpu")
    _backward_function(library)(
        DTYPES[x.dtype], are_parameters_float, is_rms, grad.data_ptr(),
        None if grad_total is None else grad_total.data_ptr(),
        x.data_ptr(),
        None if weight is None else weight.data_ptr(),
        statistics.data_ptr(),
        None if dx is None else dx.data_ptr(),
        None if sums is None else sums.data_ptr(),
        rows, columns, torch.get_num_threads(),
    )  # fmt: skip
    return (dx, None, None) if sums is None else (dx, sums[0, 0], sums[0, 1])


@functools.cache
def _function(library: ctypes.CDLL) -> Any:
    norm = library.fusedformer_norm
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    norm.argtypes = [*[number] * 3, *[pointer] * 7, *[size] * 2, ctypes.c_float, number]
    return norm


@functools.cache
def _backward_function(library: ctypes.CDLL) -> Any:
    backward = library.fusedformer_norm_backward
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    backward.argtypes = [*[number] * 3, *[pointer] * 7, *[size] * 2, number]
    return backward
