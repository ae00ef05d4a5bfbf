"""Compute LayerNorm and RMSNorm, alone or with bias, dropout and residual: registration, autograd.

One registered op serves them all: ``kind`` is ``"layer"``, ``"rms"`` or ``"none"`` (only the sum).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import (
    cast_gradient,
    common_dtype,
    draw_seed,
    needs_gradient,
    no_double_backward,
)
from fusedformer.ops.dropout_aten import dropout_add_aten
from fusedformer.ops.norm_aten import Shape, add_norm_aten, epsilon, norm_aten


def layer_norm(
    input: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """Compute :func:`fusedformer.functional.layer_norm` in ``dtype``."""
    if chosen_backend(input) == "torch":
        return norm_aten("layer", input, shape, weight, bias, eps, dtype)
    checks.check_kernel_dtype("layer_norm", "input", input)
    return _run(input, None, None, weight, bias, 0.0, eps, "layer", len(shape), False, dtype)[0]


def rms_norm(
    input: Tensor,
    shape: Shape,
    weight: Tensor | None,
    eps: float | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Compute :func:`fusedformer.functional.rms_norm` in ``dtype``."""
    if chosen_backend(input) == "torch":
        return norm_aten("rms", input, shape, weight, None, eps, dtype)
    checks.check_kernel_dtype("rms_norm", "input", input)
    return _run(
        input, None, None, weight, None, 0.0, epsilon(eps), "rms", len(shape), False, dtype
    )[0]


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    input_bias: Tensor | None,
    p: float,
    return_sum: bool,
    dtype: torch.dtype | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusedformer.functional.dropout_add_layer_norm`."""
    if chosen_backend(input) == "torch":
        return add_norm_aten(
            "layer", input, residual, shape, weight, bias, eps, dtype,
            input_bias=input_bias, p=p, return_sum=return_sum,
        )  # fmt: skip
    _check_for_kernels("dropout_add_layer_norm", input, residual)
    output, total = _run(
        input, residual, input_bias, weight, bias, p, eps, "layer", len(shape), return_sum, dtype
    )
    return (output, total) if return_sum else output


def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    shape: Shape,
    weight: Tensor | None,
    eps: float | None,
    *,
    input_bias: Tensor | None,
    p: float,
    return_sum: bool,
    dtype: torch.dtype | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusedformer.functional.dropout_add_rms_norm`."""
    if chosen_backend(input) == "torch":
        return add_norm_aten(
            "rms", input, residual, shape, weight, None, eps, dtype,
            input_bias=input_bias, p=p, return_sum=return_sum,
        )  # fmt: skip
    _check_for_kernels("dropout_add_rms_norm", input, residual)
    output, total = _run(
        input,
        residual,
        input_bias,
        weight,
        None,
        p,
        epsilon(eps),
        "rms",
        len(shape),
        return_sum,
        dtype,
    )
    return (output, total) if return_sum else output


def dropout_add(input: Tensor, residual: Tensor, *, input_bias: Tensor | None, p: float) -> Tensor:
    """See :func:`fusedformer.functional.dropout_add`."""
    if chosen_backend(input) == "torch":
        return _dropout_add_aten(input, residual, input_bias, p)
    _check_for_kernels("dropout_add", input, residual)
    return _run(input, residual, input_bias, None, None, p, 0.0, "none", 1, True, None)[1]


def _run(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float,
    kind: str,
    dims: int,
    wants_sum: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel: (norm, sum); it keeps what a backward needs only if there may be one."""
    seed = draw_seed(p, input.device) if p else None
    kept = needs_gradient(input, residual, input_bias, weight, bias)
    output, total, _, _ = _norm(
        input,
        residual,
        input_bias,
        weight,
        bias,
        seed,
        p,
        eps,
        kind,
        dims,
        wants_sum or kept,
        kept,
        dtype,
    )
    return output, total


def _check_for_kernels(function: str, input: Tensor, residual: Tensor) -> None:
    checks.check_kernel_dtype(function, "input", input)
    checks.check_kernel_dtype(function, "residual", residual)


def _dropout_add_aten(
    input: Tensor, residual: Tensor, input_bias: Tensor | None, p: float
) -> Tensor:
    if input_bias is not None:
        input = input + input_bias.to(input.dtype)
    return dropout_add_aten(input, residual, p)


@registered(
    "norm",
    schema="(Tensor input, Tensor? residual, Tensor? input_bias, Tensor? weight, Tensor? bias, "
    "Tensor? seed, float p, float eps, str kind, SymInt dims, bool wants_sum, "
    "bool wants_statistics, ScalarType? norm_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _norm(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    kind: str,
    dims: int,
    wants_sum: bool,
    wants_statistics: bool,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """Compute (norm, sum, mean, rstd), None where ``kind`` or a missing residual leaves it out."""
    from fusedformer_kernels.rows.norm import norm_forward

    return norm_forward(
        input,
        residual,
        input_bias,
        weight,
        bias,
        seed,
        p,
        eps,
        kind,
        dims,
        wants_sum,
        wants_statistics,
        norm_dtype,
    )


@_norm.register_fake
def _norm_fake(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    kind: str,
    dims: int,
    wants_sum: bool,
    wants_statistics: bool,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sum_dtype = input.dtype
    if residual is not None:
        sum_dtype = torch.promote_types(sum_dtype, residual.dtype)

    def rows(wanted: bool, dtype: torch.dtype) -> Tensor:
        return input.new_empty(input.shape, dtype=dtype) if wanted else nothing(input)

    def statistics(wanted: bool) -> Tensor:
        if not (wanted and wants_statistics):
            return nothing(input)
        return input.new_empty(input.shape[:-dims], dtype=torch.float32).flatten()

    return (
        rows(kind != "none", norm_dtype or sum_dtype),
        rows(residual is not None and wants_sum, sum_dtype),
        statistics(kind == "layer"), statistics(kind != "none"),
    )  # fmt: skip


@registered(
    "norm_backward",
    schema="(Tensor? grad, Tensor? sum_grad, Tensor normed, Tensor? mean, Tensor? rstd, "
    "Tensor? weight, Tensor? seed, float p, str kind, SymInt dims, bool needs_weight_grad, "
    "bool needs_bias_grad, bool needs_input_bias_grad, ScalarType input_dtype, "
    "ScalarType parameter_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _norm_backward(
    grad: Tensor | None,
    sum_grad: Tensor | None,
    normed: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    kind: str,
    dims: int,
    needs_weight_grad: bool,
    needs_bias_grad: bool,
    needs_input_bias_grad: bool,
    input_dtype: torch.dtype,
    parameter_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Compute gradients of (residual, input if it differs, weight, bias, input bias)."""
    from fusedformer_kernels.rows.norm_backward import norm_backward

    return norm_backward(
        grad,
        sum_grad,
        normed,
        mean,
        rstd,
        weight,
        seed,
        p,
        kind,
        dims,
        needs_weight_grad,
        needs_bias_grad,
        needs_input_bias_grad,
        input_dtype,
        parameter_dtype,
    )


@_norm_backward.register_fake
def _norm_backward_fake(
    grad: Tensor | None,
    sum_grad: Tensor | None,
    normed: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    kind: str,
    dims: int,
    needs_weight_grad: bool,
    needs_bias_grad: bool,
    needs_input_bias_grad: bool,
    input_dtype: torch.dtype,
    parameter_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    shape = normed.shape[-dims:]
    differs = seed is not None or input_dtype != normed.dtype

    def parameter_grad(wanted: bool) -> Tensor | None:
        return normed.new_empty(shape, dtype=parameter_dtype) if wanted else None

    return (
        normed.new_empty(normed.shape),
        normed.new_empty(normed.shape, dtype=input_dtype) if differs else None,
        parameter_grad(needs_weight_grad),
        parameter_grad(needs_bias_grad),
        parameter_grad(needs_input_bias_grad),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    input, residual, input_bias, weight, bias, seed, ctx.p, _, ctx.kind, ctx.dims, *_ = inputs
    normed, total, mean, rstd = output
    ctx.input_dtype = input.dtype
    ctx.dtypes = [None if t is None else t.dtype for t in (input_bias, weight, bias)]
    ctx.save_for_backward(input if residual is None else total, mean, rstd, weight, seed)
    # A gradient for a place left empty would be of the wrong shape.
    absent = [total] if residual is None else [normed] if ctx.kind == "none" else []
    ctx.mark_non_differentiable(*(t for t in (mean, rstd, *absent) if t is not None))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, sum_grad: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    normed, mean, rstd, weight, seed = ctx.saved_tensors
    _, _, needs_input_bias, needs_weight, needs_bias = ctx.needs_input_grad[:5]
    if grad is None and sum_grad is None:
        return (None,) * 13
    input_dtype = ctx.input_dtype
    input_bias_dtype, weight_dtype, bias_dtype = ctx.dtypes
    residual_grad, dropped_grad, weight_grad, bias_grad, input_bias_grad = _norm_backward(
        grad,
        sum_grad,
        normed,
        mean,
        rstd,
        weight,
        seed,
        ctx.p,
        ctx.kind,
        ctx.dims,
        needs_weight,
        needs_bias,
        needs_input_bias,
        input_dtype,
        common_dtype(ctx.dtypes),
    )
    return (
        dropped_grad if seed is not None or input_dtype != normed.dtype else residual_grad,
        residual_grad if ctx.needs_input_grad[1] else None,
        cast_gradient(input_bias_grad, input_bias_dtype) if needs_input_bias else None,
        cast_gradient(weight_grad, weight_dtype) if needs_weight else None,
        cast_gradient(bias_grad, bias_dtype) if needs_bias else None,
        *(None,) * 8,
    )


_norm.register_autograd(_backward, setup_context=_save, only_launches=True)
_norm_backward.register_autograd(no_double_backward("the norms"))
