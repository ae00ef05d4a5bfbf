"""What the op files share: dropout seeds, registration, and the error for double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def register_fake(op: str) -> Callable[[Function], Function]:
    """``torch.library.register_fake``, typed."""
    decorator: Callable[[Function], Function] = torch.library.register_fake(op)
    return decorator


def draw_seed(p: float, device: torch.device) -> Tensor | None:
    """A dropout seed from torch's generator of ``device``, or None if nothing is dropped.

    It is a tensor: drawing it is captured by CUDA graphs, traced by torch.compile, and repeated
    under activation checkpointing like any other use of the generator.
    """
    if p == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


NO_DOUBLE_BACKWARD = (
    "fusedformer: double backward through {} is not implemented on the triton backend; "
    "run the forward under fusedformer.backend('torch')"
)


def no_double_backward(op: str) -> Any:
    """An autograd formula, for the backward of ``op``, that raises a clear error."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(NO_DOUBLE_BACKWARD.format(op))

    return backward


def nothing(like: Tensor) -> Tensor:
    """The empty tensor that a registered op returns for an output that was not asked for."""
    return like.new_empty(0)
