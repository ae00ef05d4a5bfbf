"""Apply dropout on the torch backend: ``torch.dropout``, or on the CPU a faster form.

ATen's CPU dropout draws a 32-bit number for each element, one after another. Here an element takes
16 bits of a 64-bit draw, and one call draws for the whole tensor: each call that threads share
waits for the slowest of them. The probability is thereby rounded to a multiple of 2**-16; elements
that are kept are multiplied by ``1 / (1 - p)``, as everywhere. What is kept for the backward is a
byte for each element. The draw runs in one thread, so the number of threads changes nothing.

Where a compiler is, C++ draws the same numbers, many at a time, and multiplies to the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer._internal.tracing import is_eager, may_be_batched
from fusedformer.ops._registered import plain_apply
from fusedformer.ops._shared import must_see_operators
from fusedformer_kernels.cpu import build
from fusedformer_kernels.cpu import dropout as kernel

# Outside of these bounds, rounding would change a probability by more than 0.2 % of it.
_SMALLEST, _LARGEST = 2.0**-8, 1.0 - 2.0**-8


def dropout_aten(x: Tensor, p: float) -> Tensor:
    """Drop elements of ``x`` with probability ``p``, and scale the rest."""
    if not p:
        return x
    if not _is_fast(x, p):
        return torch.dropout(x, p, train=True)
    dropped: Tensor = _dropout(x, None, p)
    return dropped


def dropout_add_aten(x: Tensor, residual: Tensor, p: float) -> Tensor:
    """Add ``residual`` to :func:`dropout_aten` of ``x``, in one new tensor."""
    if not p:
        return x + residual
    if not _is_fast(x, p) or x.dtype != residual.dtype or x.shape != residual.shape:
        return dropout_aten(x, p) + residual
    total: Tensor = _dropout(x, residual, p)
    return total


def draw_kept(x: Tensor, p: float) -> Tensor:
    """Draw which elements of a tensor like ``x`` are kept, as 0 and 1 of uint8.

    Booleans would do, but ATen takes five to ten times as long over them.
    """
    kept = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    draw_into(kept, p)
    return kept


def draw_into(kept: Tensor, p: float) -> None:
    """Draw :func:`draw_kept` into contiguous ``kept``."""
    if not _SMALLEST <= p <= _LARGEST or kept.device.type != "cpu":
        kept.bernoulli_(1.0 - p)
        return
    draw = kernel.draw if is_eager() and kernel.draws_as_torch() else kernel.draw_by_aten
    draw(kept, round(p * 2**16) - 2**15)


def drop_in_place(x: Tensor, p: float) -> Tensor | None:
    """Drop elements of contiguous ``x``; return which were kept, or None for all."""
    if not p:
        return None
    kept = draw_kept(x, p)
    drop_again_in_place(x, kept, p)
    return kept


def drop_again_in_place(x: Tensor, kept: Tensor | None, p: float) -> None:
    """Drop the same elements: of the activation again, or of its gradient."""
    if kept is not None:
        _apply(x, None, kept, p, x)


def _apply(x: Tensor, residual: Tensor | None, kept: Tensor, p: float, out: Tensor) -> Tensor:
    """Write ``residual + x * kept * kept_factor(p)`` in one pass."""
    tensors = [t for t in (x, residual, kept, out) if t is not None]
    if (
        x.dtype in (torch.float32, torch.bfloat16)
        and all(type(t) is Tensor and t.is_cpu and t.is_contiguous() for t in tensors)
        and is_eager()
        and build.library() is not None
    ):
        kernel.drop(x, residual, kept, kept_factor(p), out)
        return out
    base = x.new_zeros(()) if residual is None else residual
    return torch.addcmul(base, x, kept, value=kept_factor(p), out=out)


def dropped_again(x: Tensor, kept: Tensor, p: float) -> Tensor:
    """Return what :func:`drop_again_in_place` makes of ``x``; differentiable."""
    return x * (kept.to(x.dtype) * kept_factor(p))


def kept_factor(p: float) -> float:
    """Return the factor of elements that are kept."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _is_fast(x: Tensor, p: float) -> bool:
    # Tracers, torch.vmap and torch.func must see torch's own random calls.
    return x.device.type == "cpu" and not must_see_operators() and _SMALLEST <= p <= _LARGEST


class _Dropout(torch.autograd.Function):
    """``dropout(x)``, with a residual added to it if there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, p: float) -> Tensor:
        kept = draw_kept(x, p)
        ctx.p = p
        ctx.save_for_backward(kept)
        return _apply(x, residual, kept, p, torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (kept,) = ctx.saved_tensors
        needs_x, needs_residual, _ = ctx.needs_input_grad
        own = None
        if needs_x and (torch.is_grad_enabled() or may_be_batched()):
            own = dropped_again(grad, kept, ctx.p)
        elif needs_x:
            own = _apply(grad, None, kept, ctx.p, torch.empty_like(grad))
        return own, grad if needs_residual else None, None


_dropout = plain_apply(_Dropout)
