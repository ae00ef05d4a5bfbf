"""Shared by the op tests: kernels beside the ATen composition, both against the reference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedformer import backend, functional, reference
from fusedformer.testing import Comparison, assert_parity, parity

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(
    name: str,
    dtype: torch.dtype,
    *,
    only: Callable[[Any], Any] = lambda outputs: outputs,
    **inputs: Any,
) -> list[Comparison]:
    """Judge ``functional.NAME`` by the parity criterion, outputs and all gradients.

    ``only`` picks what of the reference's outputs the function returns. Of hundreds of tensors
    stock is lucky in one now and then: a gradient is at fault if it is for three draws of the
    output's gradient.
    """
    function = getattr(functional, name)

    def stock(**arguments: Any) -> Any:
        with backend("torch"):
            return function(**arguments)

    def truth(**arguments: Any) -> Any:
        arguments.pop("return_sum", None)
        arguments.pop("return_lse", None)
        return only(getattr(reference, name)(**arguments))

    at_fault: set[str] | None = None
    for seed in (1, 2):
        found = parity(function, stock, truth, inputs, dtype=dtype, seed=seed)
        own = {c.name for c in found if c.fault}
        at_fault = own if at_fault is None else at_fault & own
        if not at_fault:
            return found
    return assert_parity(function, stock, truth, inputs, dtype=dtype)


def first(outputs: Any) -> Tensor:
    """The first of several outputs."""
    result: Tensor = outputs[0]
    return result


def grad(*shape: int, device: str = "cpu") -> Tensor:
    """Standard normal leaf that requires a gradient."""
    return torch.randn(shape, device=device).requires_grad_()
