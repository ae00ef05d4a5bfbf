"""Gate an activation by the other half of each row: the op, its autograd, its backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import draw_seed, no_double_backward
from fusedformer.ops.activation import activate_aten
from fusedformer.ops.dropout_aten import dropout_aten


def gated_activation(
    input: Tensor, bias: Tensor | None, activation: str, p: float, *, activates_second: bool
) -> Tensor:
    """See :func:`fusedformer.functional.gated_activation`."""
    if chosen_backend(input) == "torch":
        biased = input if bias is None else input + bias.to(input.dtype)
        first, second = biased.chunk(2, -1)
        if activates_second:
            first, second = second, first
        return dropout_aten(activate_aten(first, activation) * second, p)
    checks.check_kernel_dtype("gated_activation", "input", input)
    seed = draw_seed(p, input.device)
    found: Tensor = _gated_activation(input, bias, seed, p, activation, activates_second)
    return found


@registered("gated_activation")
def _gated_activation(
    input: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    activates_second: bool,
) -> Tensor:
    from fusedformer_kernels.rows.gated import gated_activation_forward

    return gated_activation_forward(input, bias, seed, p, activation, activates_second)


@_gated_activation.register_fake
def _gated_activation_fake(
    input: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    activates_second: bool,
) -> Tensor:
    return input.new_empty(*input.shape[:-1], input.shape[-1] // 2)


@registered(
    "gated_activation_backward",
    schema="(Tensor grad, Tensor input, Tensor? bias, Tensor? seed, float p, str activation, "
    "bool activates_second, bool needs_bias_grad) -> (Tensor, Tensor)",
)
def _gated_activation_backward(
    grad: Tensor,
    input: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    activates_second: bool,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    from fusedformer_kernels.rows.gated import gated_activation_backward

    return gated_activation_backward(
        grad, input, bias, seed, p, activation, activates_second, needs_bias_grad
    )


@_gated_activation_backward.register_fake
def _gated_activation_backward_fake(
    grad: Tensor,
    input: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    activates_second: bool,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    bias_grad = nothing(input)
    if bias is not None and needs_bias_grad:
        bias_grad = torch.empty_like(bias)
    return input.new_empty(input.shape), bias_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, bias, seed, ctx.p, ctx.activation, ctx.activates_second = inputs
    ctx.save_for_backward(input, bias, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, bias, seed = ctx.saved_tensors
    needs_bias = ctx.needs_input_grad[1]
    input_grad, bias_grad = _gated_activation_backward(
        grad, input, bias, seed, ctx.p, ctx.activation, ctx.activates_second, needs_bias
    )
    return input_grad, bias_grad if needs_bias else None, None, None, None, None


_gated_activation.register_autograd(_backward, setup_context=_save, only_launches=True)
_gated_activation_backward.register_autograd(no_double_backward("gated_activation"))
