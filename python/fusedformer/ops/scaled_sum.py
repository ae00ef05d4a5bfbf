"""Add a scaled branch to a residual (LayerScale, stochastic depth): the op, its autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer.errors import BadValueError
from fusedformer.ops._registered import registered
from fusedformer.ops._shared import cast_gradient, common_dtype, draw_seed, no_double_backward
from fusedformer.ops.dropout_aten import dropout_aten


def dropout_scale_add(
    input: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    sample_scale: Tensor | None,
    *,
    input_bias: Tensor | None,
    p: float,
) -> Tensor:
    """See :func:`fusedformer.functional.dropout_scale_add`."""
    if chosen_backend(input) == "torch":
        return _dropout_scale_add_aten(input, residual, scale, sample_scale, input_bias, p)
    for name, tensor in (("input", input), ("residual", residual)):
        checks.check_kernel_dtype("dropout_scale_add", name, tensor)
    if sample_scale is not None and torch.is_grad_enabled() and sample_scale.requires_grad:
        raise BadValueError(
            "dropout_scale_add(): the kernels compute no gradient of 'sample_scale'; detach it, "
            "or run it under fusedformer.backend('torch')"
        )
    seed = draw_seed(p, input.device) if p else None
    found: Tensor = _scaled_sum(input, residual, scale, sample_scale, input_bias, seed, p)
    return found


def _dropout_scale_add_aten(
    input: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    sample_scale: Tensor | None,
    input_bias: Tensor | None,
    p: float,
) -> Tensor:
    if input_bias is not None:
        input = input + input_bias.to(input.dtype)
    input = dropout_aten(input, p)
    if sample_scale is None and scale is not None:
        return torch.addcmul(residual, input, scale)
    if scale is not None:
        input = input * scale
    if sample_scale is not None:
        input = input * sample_scale.to(input.dtype).view(-1, *[1] * (input.dim() - 1))
    return input + residual


@registered("scaled_sum")
def _scaled_sum(
    input: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    sample_scale: Tensor | None,
    input_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
) -> Tensor:
    from fusedformer_kernels.rows.scaled_sum import scaled_sum_forward

    return scaled_sum_forward(input, residual, scale, sample_scale, input_bias, seed, p)


@_scaled_sum.register_fake
def _scaled_sum_fake(
    input: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    sample_scale: Tensor | None,
    input_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
) -> Tensor:
    dtype = torch.promote_types(input.dtype, residual.dtype)
    dtype = dtype if scale is None else torch.promote_types(dtype, scale.dtype)
    return input.new_empty(input.shape, dtype=dtype)


@registered(
    "scaled_sum_backward",
    schema="(Tensor grad, Tensor? input, Tensor? scale, Tensor? sample_scale, Tensor? input_bias, "
    "Tensor? seed, float p, bool needs_scale_grad, bool needs_input_bias_grad, "
    "ScalarType input_dtype, ScalarType parameter_dtype) -> (Tensor, Tensor, Tensor)",
)
def _scaled_sum_backward(
    grad: Tensor,
    input: Tensor | None,
    scale: Tensor | None,
    sample_scale: Tensor | None,
    input_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    needs_scale_grad: bool,
    needs_input_bias_grad: bool,
    input_dtype: torch.dtype,
    parameter_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Compute gradients of (input, scale, input bias)."""
    from fusedformer_kernels.rows.scaled_sum import scaled_sum_backward

    return scaled_sum_backward(
        grad,
        input,
        scale,
        sample_scale,
        input_bias,
        seed,
        p,
        needs_scale_grad,
        needs_input_bias_grad,
        input_dtype,
        parameter_dtype,
    )


@_scaled_sum_backward.register_fake
def _scaled_sum_backward_fake(
    grad: Tensor,
    input: Tensor | None,
    scale: Tensor | None,
    sample_scale: Tensor | None,
    input_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    needs_scale_grad: bool,
    needs_input_bias_grad: bool,
    input_dtype: torch.dtype,
    parameter_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    def of_columns(wanted: bool) -> Tensor | None:
        return grad.new_empty(grad.shape[-1:], dtype=parameter_dtype) if wanted else None

    return (
        grad.new_empty(grad.shape, dtype=input_dtype),
        of_columns(needs_scale_grad),
        of_columns(needs_input_bias_grad),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, residual, scale, sample_scale, input_bias, seed, ctx.p = inputs
    ctx.input_dtype, ctx.residual_dtype = input.dtype, residual.dtype
    ctx.dtypes = [None if t is None else t.dtype for t in (scale, input_bias)]
    # Under torch.func, wrapped tensors do not say whether they require a gradient.
    needs_input = scale is not None and (
        scale.requires_grad or torch._C._are_functorch_transforms_active()
    )
    ctx.save_for_backward(
        input if needs_input else None,
        scale,
        sample_scale,
        input_bias if needs_input else None,
        seed,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, scale, sample_scale, input_bias, seed = ctx.saved_tensors
    _, needs_residual, needs_scale, _, needs_input_bias, *_ = ctx.needs_input_grad
    input_grad, scale_grad, input_bias_grad = _scaled_sum_backward(
        grad,
        input,
        scale,
        sample_scale,
        input_bias,
        seed,
        ctx.p,
        needs_scale,
        needs_input_bias,
        ctx.input_dtype,
        common_dtype(ctx.dtypes),
    )
    scale_dtype, input_bias_dtype = ctx.dtypes
    return (
        input_grad,
        cast_gradient(grad, ctx.residual_dtype) if needs_residual else None,
        cast_gradient(scale_grad, scale_dtype) if needs_scale else None,
        None,
        cast_gradient(input_bias_grad, input_bias_dtype) if needs_input_bias else None,
        None,
        None,
    )


_scaled_sum.register_autograd(_backward, setup_context=_save, only_launches=True)
_scaled_sum_backward.register_autograd(no_double_backward("dropout_scale_add"))
