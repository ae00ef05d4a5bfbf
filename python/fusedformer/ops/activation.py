"""Add a bias, apply an activation and dropout: the op, its autograd, its backends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import draw_seed, no_double_backward
from fusedformer.ops.dropout_aten import dropout_aten

QUICK = 1.702


def bias_activation(
    input: Tensor, bias: Tensor | None, activation: str, p: float, *, seed: Tensor | None = None
) -> Tensor:
    """See :func:`fusedformer.functional.bias_activation`; the kernel draws ``seed`` if None."""
    if chosen_backend(input) == "torch":
        biased = input if bias is None else input + bias.to(input.dtype)
        return dropout_aten(activate_aten(biased, activation), p)
    checks.check_kernel_dtype("bias_activation", "input", input)
    seed = draw_seed(p, input.device) if seed is None else seed
    return _bias_activation(input, bias, seed, p, activation)


def bias_activation_gradients(
    grad: Tensor,
    input: Tensor,
    bias: Tensor | None,
    activation: str,
    p: float,
    seed: Tensor | None,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute gradients of ``input`` and, if needed, ``bias``, by kernels; no double backward."""
    input_grad, bias_grad = _bias_activation_backward(
        grad, input, bias, seed, p, activation, needs_bias_grad
    )
    return input_grad, bias_grad if needs_bias_grad else None


def activate_aten(x: Tensor, activation: str) -> Tensor:
    """Apply the activation by ATen."""
    if activation == "relu":
        return torch.relu(x)
    if activation == "silu":
        return F.silu(x)
    if activation == "quick_gelu":
        return F.silu(x * QUICK) / QUICK
    return F.gelu(x, approximate=_form(activation))


def activation_gradient_in_place(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """Turn the gradient of the result of :func:`activate_aten` into that of ``x``, in place."""
    aten = torch.ops.aten
    if activation == "relu":
        found = aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
    elif activation in ("silu", "quick_gelu"):
        scaled = x if activation == "silu" else x * QUICK
        found = aten.silu_backward.grad_input(grad, scaled, grad_input=grad)
    else:
        form = _form(activation)
        found = aten.gelu_backward.grad_input(grad, x, approximate=form, grad_input=grad)
    result: Tensor = found
    return result


def _form(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


@registered("bias_activation")
def _bias_activation(
    input: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, activation: str
) -> Tensor:
    from fusedformer_kernels.rows.activation import bias_activation_forward

    return bias_activation_forward(input, bias, seed, p, activation)


@_bias_activation.register_fake
def _bias_activation_fake(
    input: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, activation: str
) -> Tensor:
    return input.new_empty(input.shape)


@registered(
    "bias_activation_backward",
    schema="(Tensor grad, Tensor input, Tensor? bias, Tensor? seed, float p, str activation, "
    "bool needs_bias_grad) -> (Tensor, Tensor)",
)
def _bias_activation_backward(
    grad: Tensor,
    input: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    from fusedformer_kernels.rows.activation import bias_activation_backward

    return bias_activation_backward(grad, input, bias, seed, p, activation, needs_bias_grad)


@_bias_activation_backward.register_fake
def _bias_activation_backward_fake(
    grad: Tensor,
    input: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    bias_grad = nothing(input)
    if bias is not None and needs_bias_grad:
        bias_grad = torch.empty_like(bias)
    return input.new_empty(input.shape), bias_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, bias, seed, ctx.p, ctx.activation = inputs
    ctx.save_for_backward(input, bias, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, bias, seed = ctx.saved_tensors
    grads = bias_activation_gradients(
        grad, input, bias, ctx.activation, ctx.p, seed, ctx.needs_input_grad[1]
    )
    return *grads, None, None, None


_bias_activation.register_autograd(_backward, setup_context=_save, only_launches=True)
_bias_activation_backward.register_autograd(no_double_backward("bias_activation"))
