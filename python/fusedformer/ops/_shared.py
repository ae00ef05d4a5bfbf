"""Draw dropout seeds, and refuse double backward; shared by the op files."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedformer._internal.plans import unplanned
from fusedformer._internal.tracing import is_traced, may_be_batched


def draw_seed(p: float, device: torch.device) -> Tensor | None:
    """Draw a dropout seed from torch's generator of ``device``, or None if nothing is dropped.

    It is a tensor, so that CUDA graphs capture the draw, torch.compile traces it, and activation
    checkpointing repeats it like any other use of the generator.
    """
    if p == 0.0:
        return None
    unplanned()
    drawn, used = _seeds.drawn, _seeds.used
    if torch.compiler.is_compiling() or used >= _seeds.count:
        own = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
        return own + _seeds.offset if _seeds.offset else own
    # Every other number is skipped: kernels are compiled for pointers to multiples of 16 bytes.
    if drawn is None or drawn.device != device:
        drawn = torch.randint(0, 2**63 - 1, (2 * _seeds.count,), dtype=torch.int64, device=device)
    _seeds.drawn, _seeds.used = drawn, used + 1
    own = drawn[2 * used : 2 * used + 1]
    return own + _seeds.offset if _seeds.offset else own


def cast_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a gradient that kernels computed, if it has not the dtype yet."""
    if grad.dtype == dtype:
        return grad
    unplanned()
    return grad.to(dtype)


class _Seeds(threading.local):
    """The seeds of a thread: ``count`` are drawn at once, and ``used`` of them are given out."""

    count = 0
    used = 0
    drawn: Tensor | None = None
    offset = 0


_seeds = _Seeds()


@contextlib.contextmanager
def seeds_drawn_at_once(count: int) -> Iterator[None]:
    """Draw the first ``count`` seeds inside in one launch; an outer context of this kind wins."""
    if _seeds.count or torch.compiler.is_compiling():
        yield
        return
    _seeds.count, _seeds.used, _seeds.drawn = count, 0, None
    try:
        yield
    finally:
        _seeds.count, _seeds.used, _seeds.drawn = 0, 0, None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Tell whether a backward may follow, so that tensors must be saved for it.

    Under torch.func, wrapped tensors do not say whether they require a gradient.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def common_dtype(dtypes: list[torch.dtype | None]) -> torch.dtype:
    """Return the dtype that all given parameters share, or float32 if they differ."""
    found = {dtype for dtype in dtypes if dtype is not None}
    return found.pop() if len(found) == 1 else torch.float32


def must_see_operators() -> bool:
    """Tell whether a tracer, ``torch.func`` or a batch of gradients has to see what torch does."""
    return is_traced() or may_be_batched() or is_transformed()


def is_transformed() -> bool:
    """Tell whether ``torch.func`` or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@contextlib.contextmanager
def seeds_added_to(number: int) -> Iterator[None]:
    """Add ``number`` to the seeds drawn inside, so that ranks of one generator differ."""
    before, _seeds.offset = _seeds.offset, number
    try:
        yield
    finally:
        _seeds.offset = before


NO_DOUBLE_BACKWARD = (
    "fusedformer: double backward through {} is not implemented on the triton backend; "
    "run the forward under fusedformer.backend('torch')"
)


def no_double_backward(op: str) -> Any:
    """Return an autograd formula for the backward of ``op`` that raises a clear error."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(NO_DOUBLE_BACKWARD.format(op))

    return backward
