"""Call the compiled steps of an encoder's layer that compute each row by itself, in inference."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer_kernels.cpu import build

ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4}
Pair = Sequence[Any]  # a weight and a bias, or None in their places


class Block(NamedTuple):
    """Parameters of what follows attention, each a weight and a bias; and how they are used."""

    last: Pair  # attention's last product
    middle: Pair
    middle_eps: float
    first: Pair
    second: Pair
    end: Pair  # the norm after the last sum; of none where norms come first
    end_eps: float
    activation: str
    norms_first: bool


class _Product(ctypes.Structure):
    """The same as in layer.cpp, as those below."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "packed")),
        *((name, ctypes.c_int64) for name in ("in", "out")),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("eps", ctypes.c_float),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("heads", "residual", "out")),
        *((name, _Product) for name in ("last", "first", "second")),
        *((name, _Norm) for name in ("middle", "end")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("activation", "norms_first", "threads")),
    )


class _Projections(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "products", "outs")),
        *((name, ctypes.c_int64) for name in ("count", "rows")),
        ("threads", ctypes.c_int32),
    )


@functools.cache
def computes(dtype: torch.dtype) -> bool:
    """Tell whether products are computed here: on processors where no others are faster."""
    return dtype in (torch.float32, torch.bfloat16) and bool(_panel(dtype))


def project(x: Tensor, products: Sequence[Pair]) -> list[Tensor]:
    """``x @ weight.T + bias`` ``[*, out]`` of each of ``products``, for ``x`` ``[*, in]``.

    All are contiguous, not empty, and of one dtype that :func:`computes` knows; in bfloat16 ``in``
    is even.
    """
    outs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight, _ in products]
    packed = [_packed(weight) for weight, _ in products]
    given = [_product(one, memory) for one, memory in zip(products, packed, strict=True)]
    call = _Projections(
        x.data_ptr(),
        ctypes.addressof(listed := (_Product * len(given))(*given)),
        ctypes.addressof(results := (ctypes.c_void_p * len(outs))(*(t.data_ptr() for t in outs))),
        len(given), x.numel() // x.shape[-1], torch.get_num_threads(),
    )  # fmt: skip
    build.loaded().fusedformer_project(x.dtype is torch.bfloat16, ctypes.byref(call))
    del listed, results  # until here they are read
    return outs


def block(heads: Tensor, residual: Tensor, block: Block) -> Tensor:
    """What a layer makes of attention's ``heads`` ``[*, in]``, by ``block``; as ``residual``.

    As in :func:`project`; in bfloat16 the widths of all products are even.
    """
    out = torch.empty_like(residual)
    products = block.last, block.first, block.second
    packed = [_packed(weight) for weight, _ in products]
    call = _Block(
        heads.data_ptr(), residual.data_ptr(), out.data_ptr(),
        *(_product(one, memory) for one, memory in zip(products, packed, strict=True)),
        _Norm(*map(_pointer, block.middle), block.middle_eps),
        _Norm(*map(_pointer, block.end), block.end_eps),
        heads.numel() // heads.shape[-1], ACTIVATIONS[block.activation], block.norms_first,
        torch.get_num_threads(),
    )  # fmt: skip
    build.loaded().fusedformer_block(heads.dtype is torch.bfloat16, ctypes.byref(call))
    return out


def _packed(weight: Tensor) -> Tensor:
    """Memory for the panels of a weight."""
    panel = _panel(weight.dtype)
    return weight.new_empty(-(-weight.shape[0] // panel) * panel, weight.shape[1])


def _product(given: Pair, packed: Tensor) -> _Product:
    weight, bias = given
    return _Product(
        weight.data_ptr(), _pointer(bias), packed.data_ptr(), weight.shape[1], weight.shape[0]
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _panel(dtype: torch.dtype) -> int:
    library = build.library()
    if library is None:
        return 0
    panel = library.fusedformer_panel
    panel.restype = ctypes.c_int64
    return int(panel(dtype is torch.bfloat16))
