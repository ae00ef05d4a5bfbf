"""Compute softmax and log_softmax: the op, its autograd, its backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer._internal.plans import unplanned
from fusedformer.errors import BadTypeError
from fusedformer.ops._registered import registered
from fusedformer.ops._shared import no_double_backward


def softmax(
    input: Tensor,
    dim: int,
    *,
    scale: float,
    mask: Tensor | None,
    is_causal: bool,
    dtype: torch.dtype,
    log: bool,
) -> Tensor:
    """See :func:`fusedformer.functional.softmax`, and log_softmax for ``log=True``."""
    if chosen_backend(input) == "torch":
        return _softmax_aten(input, dim, scale, mask, is_causal, dtype, log)
    name = "log_softmax" if log else "softmax"
    checks.check_kernel_dtype(name, "input", input)
    if dtype not in checks.KERNEL_DTYPES:
        raise BadTypeError(
            f"{name}(): the triton backend computes float32, float16 and bfloat16, but got "
            f"dtype={dtype}; run it under fusedformer.backend('torch')"
        )
    if input.dim() == 0:
        mask = None if mask is None else mask.reshape(1)
        return _softmax(input.reshape(1), mask, scale, is_causal, dtype, log).reshape(())
    if mask is not None:
        mask = mask.expand(input.shape)
    if dim in (-1, input.dim() - 1):
        result: Tensor = _softmax(input, mask, scale, is_causal, dtype, log)
        return result
    if mask is not None:
        mask = mask.movedim(dim, -1)
    return _softmax(input.movedim(dim, -1), mask, scale, is_causal, dtype, log).movedim(-1, dim)


def _softmax_aten(
    input: Tensor,
    dim: int,
    scale: float,
    mask: Tensor | None,
    is_causal: bool,
    dtype: torch.dtype,
    log: bool,
) -> Tensor:
    function: Callable[..., Tensor] = torch.log_softmax if log else torch.softmax
    masked = mask is not None or is_causal
    if not masked and scale == 1.0:
        return function(input, dim, dtype=dtype)
    # The scores are kept in at least float32, as the kernel keeps them.
    scores = input.to(torch.promote_types(dtype, torch.float32)) * scale
    if mask is not None:
        keep = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if keep else scores + mask
    if is_causal:
        rows, columns = scores.shape[-2:]
        ones = torch.ones(rows, columns, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~ones.tril(), -torch.inf)
    if not masked:
        return function(scores, dim).to(dtype)
    removed = (scores == -torch.inf).all(dim, keepdim=True)
    # Removed rows are computed from zeros and then masked: no NaN, forward or backward.
    probabilities = function(scores.masked_fill(removed, 0.0), dim)
    return probabilities.masked_fill(removed, -torch.inf if log else 0.0).to(dtype)


@registered("softmax")
def _softmax(
    input: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    dtype: torch.dtype,
    log: bool,
) -> Tensor:
    from fusedformer_kernels.rows.softmax import softmax_forward

    return softmax_forward(input, mask, scale, is_causal, dtype, log)


@_softmax.register_fake
def _softmax_fake(
    input: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    dtype: torch.dtype,
    log: bool,
) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype)


@registered("softmax_backward")
def _softmax_backward(
    grad: Tensor, output: Tensor, scale: float, dtype: torch.dtype, log: bool, masked: bool
) -> Tensor:
    from fusedformer_kernels.rows.softmax import softmax_backward

    return softmax_backward(grad, output, scale, dtype, log, masked)


@_softmax_backward.register_fake
def _softmax_backward_fake(
    grad: Tensor, output: Tensor, scale: float, dtype: torch.dtype, log: bool, masked: bool
) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, mask, scale, is_causal, _, log = inputs
    ctx.save_for_backward(output)
    ctx.dtype = input.dtype
    ctx.mask = None if mask is None else (mask.shape, mask.dtype)
    ctx.scale, ctx.log, ctx.masked = scale, log, mask is not None or is_causal


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (output,) = ctx.saved_tensors
    input_grad = mask_grad = None
    if ctx.needs_input_grad[1]:
        unplanned()
        # The input's gradient is a multiple of that of the scores, which is the mask's.
        scores_grad = _softmax_backward(grad, output, 1.0, torch.float32, ctx.log, ctx.masked)
        mask_grad = scores_grad.to(ctx.mask[1])
        if ctx.needs_input_grad[0]:
            input_grad = (scores_grad * ctx.scale).to(ctx.dtype)
    elif ctx.needs_input_grad[0]:
        input_grad = _softmax_backward(grad, output, ctx.scale, ctx.dtype, ctx.log, ctx.masked)
    return input_grad, mask_grad, None, None, None, None


_softmax.register_autograd(_backward, setup_context=_save, only_launches=True)
_softmax_backward.register_autograd(no_double_backward("softmax"))
