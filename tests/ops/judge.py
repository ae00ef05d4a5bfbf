"""Shared by the op tests: kernels beside torch's own function, both against the reference."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedformer import backend, functional, reference
from fusedformer.testing import Comparison, assert_function_parity, parity

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FEW = 16  # numbers of a tensor whose largest error is luck


def is_right_over(draws: list[Comparison], dtype: torch.dtype) -> bool:
    """Whether the largest error of several draws of one tensor is within the criterion's limit.

    Of few numbers that of one draw is luck, ours as stock's.
    """
    stock, largest = (max(getattr(c, name) for c in draws) for name in ("stock_error", "largest"))
    limit: float = 2 * stock + 2 * torch.finfo(dtype).eps * largest
    return max(c.error for c in draws) <= limit < largest


def check(
    name: str,
    dtype: torch.dtype,
    *,
    only: Callable[[Any], Any] = lambda outputs: outputs,
    **inputs: Any,
) -> list[Comparison]:
    """Judge ``functional.NAME`` by the parity criterion, outputs and all gradients.

    ``only`` picks what of the reference's outputs the function returns. Of hundreds of tensors the
    yardstick is lucky in one now and then: a gradient is at fault if it is for three draws of the
    output's gradient.
    """
    function, beside = getattr(functional, name), yardstick(name, inputs)

    def truth(**arguments: Any) -> Any:
        arguments.pop("return_sum", None)
        arguments.pop("return_lse", None)
        return only(getattr(reference, name)(**arguments))

    at_fault: set[str] | None = None
    for seed in (1, 2):
        found = parity(function, beside, truth, inputs, dtype=dtype, seed=seed)
        own = {c.name for c in found if c.fault}
        at_fault = own if at_fault is None else at_fault & own
        if not at_fault:
            return found
    return assert_function_parity(function, beside, truth, inputs, dtype=dtype)


def yardstick(name: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """Torch's function of that name if it takes these arguments, else our composition of ATen's."""
    mask, causal = inputs.get("attn_mask"), inputs.get("is_causal", False)
    refused = mask is not None and (causal or mask.dim() == 1)
    wrong = causal and (inputs.get("scale") or 1.0) < 0  # torch's is NaN, on the CPU
    if set(inputs) <= torch_arguments(name) and not refused and not wrong:
        function: Callable[..., Any] = getattr(torch.nn.functional, name)
        return function

    def composition(**arguments: Any) -> Any:
        with backend("torch"):
            return getattr(functional, name)(**arguments)

    return composition


def torch_arguments(name: str) -> set[str]:
    """Names of what torch's function takes; none if torch has no such function."""
    if name == "scaled_dot_product_attention":  # written in C++
        schema = torch.ops.aten.scaled_dot_product_attention.default._schema
        return {argument.name for argument in schema.arguments}
    function = getattr(torch.nn.functional, name, None)
    return set(inspect.signature(function).parameters) if function else set()


def first(outputs: Any) -> Tensor:
    """The first of several outputs."""
    result: Tensor = outputs[0]
    return result


def grad(*shape: int, device: str = "cpu") -> Tensor:
    """Standard normal leaf that requires a gradient."""
    return torch.randn(shape, device=device).requires_grad_()
