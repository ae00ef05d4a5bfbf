"""bias + activation + dropout: registration, autograd, choice of backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import _checks
from fusedformer._backend import chosen_backend
from fusedformer.ops._shared import draw_seed, no_double_backward, nothing, register_fake


def bias_activation(input: Tensor, bias: Tensor | None, activation: str, p: float) -> Tensor:
    """See :func:`fusedformer.functional.bias_activation`."""
    if chosen_backend(input) == "torch":
        return _bias_activation_aten(input, bias, activation, p)
    _checks.check_kernel_dtype("bias_activation", "input", input)
    return _bias_activation(input, bias, draw_seed(p, input.device), p, activation)


def _bias_activation_aten(input: Tensor, bias: Tensor | None, activation: str, p: float) -> Tensor:
    if bias is not None:
        input = input + bias.to(input.dtype)
    if activation == "relu":
        output = torch.relu(input)
    elif activation == "silu":
        output = F.silu(input)
    else:
        output = F.gelu(input, approximate="tanh" if activation == "gelu_tanh" else "none")
    return torch.dropout(output, p, train=True) if p else output


@torch.library.custom_op("fusedformer::bias_activation", mutates_args=())
def _bias_activation(
    input: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, activation: str
) -> Tensor:
    from fusedformer_kernels.activation import bias_activation_forward

    return bias_activation_forward(input, bias, seed, p, activation)


@register_fake("fusedformer::bias_activation")
def _bias_activation_fake(
    input: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, activation: str
) -> Tensor:
    return input.new_empty(input.shape)


@torch.library.custom_op("fusedformer::bias_activation_backward", mutates_args=())
def _bias_activation_backward(
    grad: Tensor,
    input: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    from fusedformer_kernels.activation import bias_activation_backward

    input_grad, bias_grad = bias_activation_backward(
        grad, input, bias, seed, p, activation, needs_bias_grad
    )
    return input_grad, nothing(input) if bias_grad is None else bias_grad


@register_fake("fusedformer::bias_activation_backward")
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
    needs_bias_grad = ctx.needs_input_grad[1]
    input_grad, bias_grad = _bias_activation_backward(
        grad, input, bias, seed, ctx.p, ctx.activation, needs_bias_grad
    )
    return input_grad, bias_grad if needs_bias_grad else None, None, None, None


torch.library.register_autograd("fusedformer::bias_activation", _backward, setup_context=_save)
torch.library.register_autograd(
    "fusedformer::bias_activation_backward", no_double_backward("bias_activation")
)
