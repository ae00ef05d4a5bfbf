"""Apply dropout on the torch backend: ``torch.dropout``, or on the CPU a faster form.

ATen's CPU dropout draws a 32-bit number for each element, one after another. Here an element takes
16 bits of a 64-bit draw, in pieces that stay in the cache. The probability is thereby rounded to a
multiple of 2**-16; elements that are kept are multiplied by ``1 / (1 - p)``, as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedformer._internal.tracing import is_traced, may_be_batched

# Outside of these bounds, rounding would change a probability by more than 0.2 % of it.
_SMALLEST, _LARGEST = 2.0**-8, 1.0 - 2.0**-8
_PIECE = 2**17


def dropout_aten(x: Tensor, p: float) -> Tensor:
    """Drop elements of ``x`` with probability ``p``, and scale the rest."""
    if not _is_fast(x, p):
        return torch.dropout(x, p, train=True) if p else x
    return x * _noise(x, p)


def dropout_add_aten(x: Tensor, residual: Tensor, p: float) -> Tensor:
    """Add ``residual`` to :func:`dropout_aten` of ``x``, in one new tensor."""
    if not _is_fast(x, p):
        return dropout_aten(x, p) + residual
    return torch.addcmul(residual, x, _noise(x, p))


def drop_in_place(x: Tensor, p: float) -> Tensor | None:
    """Drop elements of contiguous ``x``; return which were kept, or None for all."""
    if not p:
        return None
    if not _is_fast(x, p):
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - p)
    else:
        kept = torch.empty(x.shape, dtype=torch.bool)
        for start, stop, bits in _draws(x.numel()):
            torch.ge(bits, _dropped_values(p) - 2**15, out=kept.view(-1)[start:stop])
    drop_again_in_place(x, kept, p)
    return kept


def drop_again_in_place(x: Tensor, kept: Tensor | None, p: float) -> None:
    """Drop the same elements: of the activation again, or of its gradient."""
    if kept is None:
        return
    flat, flags, factor = x.view(-1), kept.view(torch.uint8).view(-1), _factor(p)
    for start in range(0, x.numel(), _PIECE):
        # A product with flags of another dtype takes ATen thirty times as long.
        piece = flat[start : start + _PIECE]
        piece.mul_(flags[start : start + _PIECE].to(x.dtype)).mul_(factor)


def kept_factor(kept: Tensor, p: float, x: Tensor) -> Tensor:
    """Return the factors by which :func:`drop_again_in_place` multiplies ``x``."""
    return kept.to(x.dtype) * _factor(p)


def _factor(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _is_fast(x: Tensor, p: float) -> bool:
    # Tracers and torch.vmap must see torch's own random calls.
    plain = x.device.type == "cpu" and not is_traced() and not may_be_batched()
    return plain and _SMALLEST <= p <= _LARGEST


def _dropped_values(p: float) -> int:
    """Return how many of the 2**16 values of a draw drop an element."""
    return round(p * 2**16)


def _draws(count: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, 16 random bits for each element) for pieces of ``count`` elements."""
    draws = torch.empty(min(_PIECE, count + 3) // 4, dtype=torch.int64)
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        yield start, stop, draws.random_(-(2**63), None).view(torch.int16)[: stop - start]


def _noise(x: Tensor, p: float) -> Tensor:
    """Draw the factors of dropout: 0 or ``1 / (1 - p)``."""
    noise = torch.empty(x.shape, dtype=x.dtype)
    for start, stop, bits in _draws(x.numel()):
        piece = noise.view(-1)[start:stop]
        torch.ge(bits, _dropped_values(p) - 2**15, out=piece)
        piece.mul_(_factor(p))
    return noise
