"""What the op files share: dropout seeds, and the error for double backward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedformer._internal.plans import unplanned


def draw_seed(p: float, device: torch.device) -> Tensor | None:
    """A dropout seed from torch's generator of ``device``, or None if nothing is dropped.

    It is a tensor: drawing it is captured by CUDA graphs, traced by torch.compile, and repeated
    under activation checkpointing like any other use of the generator.
    """
    if p == 0.0:
        return None
    unplanned()
    drawn, used = _seeds.drawn, _seeds.used
    if torch.compiler.is_compiling() or used >= _seeds.count:
        own = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
        return own + _seeds.added if _seeds.added else own
    # Every other one is left out: kernels are compiled for pointers to multiples of 16 bytes.
    if drawn is None or drawn.device != device:
        drawn = torch.randint(0, 2**63 - 1, (2 * _seeds.count,), dtype=torch.int64, device=device)
    _seeds.drawn, _seeds.used = drawn, used + 1
    own = drawn[2 * used : 2 * used + 1]
    return own + _seeds.added if _seeds.added else own


class _Seeds(threading.local):
    count = 0
    used = 0
    drawn: Tensor | None = None
    added = 0


_seeds = _Seeds()


@contextlib.contextmanager
def seeds_drawn_at_once(count: int) -> Iterator[None]:
    """Inside, the first ``count`` seeds come of one launch; an outer such context prevails."""
    if _seeds.count or torch.compiler.is_compiling():
        yield
        return
    _seeds.count, _seeds.used, _seeds.drawn = count, 0, None
    try:
        yield
    finally:
        _seeds.count, _seeds.used, _seeds.drawn = 0, 0, None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow, for which something is to be kept.

    Within ``vmap`` tensors hide that those behind them require a gradient.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def common_dtype(dtypes: list[torch.dtype | None]) -> torch.dtype:
    """The dtype in which kernels write the gradients of parameters, of those that there are."""
    found = {dtype for dtype in dtypes if dtype is not None}
    return found.pop() if len(found) == 1 else torch.float32


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation looks on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@contextlib.contextmanager
def seeds_added_to(number: int) -> Iterator[None]:
    """Inside, seeds are others: those drawn, and ``number``; for ranks that draw the same."""
    before, _seeds.added = _seeds.added, number
    try:
        yield
    finally:
        _seeds.added = before


NO_DOUBLE_BACKWARD = (
    "fusedformer: double backward through {} is not implemented on the triton backend; "
    "run the forward under fusedformer.backend('torch')"
)


def no_double_backward(op: str) -> Any:
    """An autograd formula, for the backward of ``op``, that raises a clear error."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(NO_DOUBLE_BACKWARD.format(op))

    return backward
