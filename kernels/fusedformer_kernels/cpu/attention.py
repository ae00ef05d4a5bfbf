"""Call the compiled attention of packed sequences, forward and backward.

Tensors are ``[rows, heads, dim]``, float32 or bfloat16, with a contiguous last dimension.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer_kernels.cpu import build


class Packed(NamedTuple):
    """Where sequences are, and what is done with their scores."""

    starts_q: Tensor  # int64 [sequences + 1], contiguous
    starts_k: Tensor
    scale: float
    places: Tensor | None = None  # int64 [sequences, 3]: see draw in ops/attention/compiled.py
    factor: float = 1.0  # on weights that dropout keeps


class _Heads(ctypes.Structure):
    """A tensor; the same as in vectors.h."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        ("head", ctypes.c_int64),
    )


class _Attention(ctypes.Structure):
    """What one call is about; the same as in vectors.h."""

    _fields_ = (
        *((name, _Heads) for name in "qkv"),
        *((name, ctypes.c_void_p) for name in ("starts_q", "starts_k", "kept", "places")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "queries", "keys")),
        *((name, ctypes.c_int64) for name in ("dim", "value_dim")),
        *((name, ctypes.c_float) for name in ("scale", "factor")),
        *((name, ctypes.c_int32) for name in ("is_bfloat16", "threads")),
    )


def fits(packed: Packed, queries: int, keys: int) -> bool:
    """Tell whether the starts are those of sequences within as many rows."""
    starts = packed.starts_q, packed.starts_k
    if len(starts[0]) != len(starts[1]) or len(starts[0]) < 1:
        return False
    ends = zip(starts, (queries, keys), strict=True)
    return all(int(s[0]) == 0 and int(s[-1]) == n and bool((s.diff() >= 0).all()) for s, n in ends)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, packed: Packed
) -> Tensor:
    """Output ``[rows, heads, value_dim]``; ``kept`` is what dropout keeps, uint8."""
    out = q.new_empty(*q.shape[:2], v.shape[2])
    call = _call(q, k, v, kept, packed)
    _function("fusedformer_attend")(ctypes.byref(call), ctypes.byref(_heads(out)))
    return out


def attention_at_once() -> Any:
    """The function that computes the forward without dropout; None where nothing is compiled."""
    library = build.library()
    return None if library is None else _at_once(library)


@functools.cache
def _at_once(library: ctypes.CDLL) -> Any:
    attend = library.fusedformer_attend_at_once
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    attend.argtypes = [
        ctypes.c_int, *[pointer] * 4, ctypes.c_int, *[pointer] * 2, *[size] * 12, ctypes.c_float,
        ctypes.c_int,
    ]  # fmt: skip
    attend.restype = ctypes.c_int
    return attend


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor | None,
    packed: Packed,
    found: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Write the gradients of q, k and v to ``found``; None: not wanted."""
    call = _call(q, k, v, kept, packed)
    _function("fusedformer_attend_backward")(
        ctypes.byref(call), *(ctypes.byref(_heads(t)) for t in (grad, *found))
    )


def _call(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, packed: Packed) -> _Attention:
    starts_q, starts_k, scale, places, factor = packed
    pointers = (None if t is None else t.data_ptr() for t in (starts_q, starts_k, kept, places))
    return _Attention(
        *map(_heads, (q, k, v)),
        *pointers,
        len(starts_q) - 1, q.shape[1], q.shape[0], k.shape[0], q.shape[2], v.shape[2],
        scale, factor,
        q.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip


def _heads(tensor: Tensor | None) -> _Heads:
    if tensor is None:
        return _Heads(None, 0, 0)
    return _Heads(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _function(name: str) -> Any:
    return getattr(build.loaded(), name)
