"""Compute the products around a residual connection, each as one node of autograd.

The products are torch's. A node of our own saves the work between them: the gradient that arrives
through the residual is the accumulator of the product that computes the other one (``beta = 1``),
not a tensor to be added later; and the feed-forward block saves only what its backward reads,
nothing for frozen parameters.

While a compiler traces, under ``torch.func`` transforms, and in the backward of a backward,
compositions of torch's differentiable calls take the nodes' place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal.autocast import autocast_dtype, autocast_off, cast
from fusedformer._internal.backend import chosen_backend
from fusedformer._internal.tracing import is_traced, may_be_batched
from fusedformer.ops._registered import plain_apply
from fusedformer.ops._shared import NO_DOUBLE_BACKWARD, draw_seed, is_transformed
from fusedformer.ops.activation import (
    activate_aten,
    activation_gradient_in_place,
    bias_activation,
    bias_activation_gradients,
)
from fusedformer.ops.dropout_aten import (
    drop_again_in_place,
    drop_in_place,
    dropout_aten,
    dropped_again,
)
from fusedformer.ops.product import (
    bias_gradient,
    input_gradient,
    product,
    product_activation,
    product_add,
    weight_gradient,
)


class FeedForward(NamedTuple):
    """The parameters and settings of ``linear2(dropout(activation(linear1(x))))``.

    A callable ``activation`` is applied as it is; a name is one that
    :func:`fusedformer.functional.bias_activation` knows.
    """

    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    activation: str | Callable[[Tensor], Tensor]
    p: float
    checkpoint_activation: bool = False


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, fork: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (``x @ weight.T + bias``, ``x``).

    Args:
        x: ``[..., d_in]``.
        weight: ``[d_out, d_in]``.
        bias: ``[d_out]``.
        fork: the gradient of the second result is added within the product that computes the
            gradient of ``x``. Then ``x`` must not be used elsewhere, and the second result once.
    """
    fork = fork and x.requires_grad
    path = _path_for(x, weight, bias)
    if path == "plain":
        return product(x, weight, bias), x
    if path == "composed" or not (fork or x.device.type == "cpu"):
        return F.linear(x, weight, bias), x
    weight, bias = _narrowed(x, weight), _narrowed(x, bias)
    found = _linear(x, weight, bias, fork)
    return found if isinstance(found, tuple) else (found, x)


def feed_forward(
    x: Tensor, block: FeedForward, *, fork: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (``block`` of ``x``, the bias that is still to be added, ``x`` as :func:`linear`).

    ATen adds the last bias within the product; the kernels add it when they read the result.
    """
    triton = chosen_backend(x) == "triton"
    late_bias = block.bias2 if triton else None
    if triton:
        block = block._replace(bias2=None)
    name = None if callable(block.activation) else block.activation
    path = _path_for(x, *block[:4])
    if name is None or path == "composed" or (triton and path == "plain"):
        return _composed(x, block), late_bias, x
    if path == "plain":
        hidden = product_activation(x, block.weight1, block.bias1, name)
        drop_in_place(hidden, block.p)
        return product(hidden, block.weight2, block.bias2), late_bias, x
    weight1, bias1, weight2, bias2 = (_narrowed(x, t) for t in block[:4])
    bias1 = block.bias1 if triton else bias1  # the kernels take it as it is
    found = _feed_forward(
        x,
        weight1,
        bias1,
        weight2,
        bias2,
        name,
        block.p,
        block.checkpoint_activation,
        fork and x.requires_grad,
    )
    return (found[0], late_bias, found[1]) if isinstance(found, tuple) else (found, late_bias, x)


def _path_for(*tensors: Tensor | None) -> Literal["plain", "node", "composed"]:
    """Choose: no autograd, a node of our own, or a composition of differentiable calls."""
    if is_traced() or is_transformed():
        return "composed"
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return "node" if wanted else "plain"


@overload
def _narrowed(x: Tensor, parameter: Tensor) -> Tensor: ...
@overload
def _narrowed(x: Tensor, parameter: Tensor | None) -> Tensor | None: ...
def _narrowed(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Cast a parameter to the dtype of products with ``x``, which autocast may narrow."""
    dtype = autocast_dtype("linear", x)
    return parameter if parameter is None or dtype is None else cast(parameter, dtype)


def _composed(x: Tensor, block: FeedForward) -> Tensor:
    """Compute the block by differentiable calls."""
    if callable(block.activation):
        hidden = block.activation(F.linear(x, block.weight1, block.bias1))
        hidden = dropout_aten(hidden, block.p)
    elif chosen_backend(x) == "torch":
        hidden = F.linear(x, block.weight1, block.bias1)
        hidden = bias_activation(hidden, None, block.activation, block.p)
    else:
        hidden = F.linear(x, block.weight1)
        hidden = bias_activation(hidden, block.bias1, block.activation, block.p)
    return F.linear(hidden, block.weight2, block.bias2)


class _Linear(torch.autograd.Function):
    """``F.linear``, with the gradient of the residual added in a product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fork: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.triton = chosen_backend(x) == "triton"
        narrow = x.to(weight.dtype)
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        # The torch backend can be differentiated again, from the inputs themselves.
        saved = (narrow if ctx.triton else x) if needs_weight else None
        ctx.save_for_backward(saved, weight if needs_x else None)
        ctx.set_materialize_grads(False)
        output = product(narrow, weight, bias)
        return (output, x) if fork else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, through: Tensor | None = None) -> tuple[Any, ...]:
        if grad is None:
            return through, None, None, None
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        with autocast_off(grad):  # the forward chose the dtypes
            return (
                input_gradient(grad, weight, through) if needs_x else None,
                weight_gradient(grad, x.to(grad.dtype)) if needs_weight else None,
                bias_gradient(grad) if needs_bias else None,
                None,
            )


class _FeedForward(torch.autograd.Function):
    """The feed-forward block; its backward may compute the activation again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        activation: str,
        p: float,
        checkpoint_activation: bool,
        fork: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.activation, ctx.p, ctx.triton = activation, p, chosen_backend(x) == "triton"
        ctx.set_materialize_grads(False)
        narrow = x.to(weight1.dtype)
        if ctx.triton:
            before, drawn = F.linear(narrow, weight1), draw_seed(p, x.device)
            hidden = bias_activation(before, bias1, activation, p, seed=drawn)
        else:
            before = product(narrow, weight1, bias1)
            hidden = activate_aten(before, activation)
            drawn = drop_in_place(hidden, p)
        output = product(hidden, weight2, bias2)
        _, needs_w1, _, needs_w2, _ = ctx.needs_input_grad[:5]
        ctx.recompute = needs_w2 and checkpoint_activation
        needs_before = any(ctx.needs_input_grad[:3])
        saved = (narrow if needs_w1 else None) if ctx.triton else x
        ctx.save_for_backward(
            saved,
            weight1,
            bias1,
            weight2,
            bias2,
            before if needs_before or ctx.recompute else None,
            hidden if needs_w2 and not ctx.recompute else None,
            drawn,
        )
        return (output, x) if fork else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, through: Tensor | None = None) -> tuple[Any, ...]:
        if grad is None:
            return through, *(None,) * 8
        with autocast_off(grad):  # the forward chose the dtypes
            mapped = may_be_batched() and not ctx.triton  # in-place calls do not take batches
            differentiable = torch.is_grad_enabled() or mapped
            find = _differentiable_gradients if differentiable else _gradients
            return *find(ctx, grad, through), *(None,) * 4


def _gradients(ctx: Any, grad: Tensor, through: Tensor | None) -> list[Tensor | None]:
    """Compute the gradients of the five inputs."""
    x, weight1, bias1, weight2, _, before, hidden, drawn = ctx.saved_tensors
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
    if ctx.recompute and ctx.triton:
        hidden = bias_activation(before, bias1, ctx.activation, ctx.p, seed=drawn)
    elif ctx.recompute:
        hidden = activate_aten(before, ctx.activation)
        drop_again_in_place(hidden, drawn, ctx.p)
    grad_w2 = weight_gradient(grad, hidden) if needs_w2 else None
    grad_b2 = bias_gradient(grad) if needs_b2 else None
    grad_x, grad_w1, grad_b1 = through, None, None
    if needs_x or needs_w1 or needs_b1:
        inner = product_add(grad, weight2, None)
        if ctx.triton:
            inner, grad_b1 = bias_activation_gradients(
                inner, before, bias1, ctx.activation, ctx.p, drawn, needs_b1
            )
        else:
            drop_again_in_place(inner, drawn, ctx.p)
            inner = activation_gradient_in_place(inner, before, ctx.activation)
            grad_b1 = bias_gradient(inner) if needs_b1 else None
        grad_w1 = weight_gradient(inner, x.to(inner.dtype)) if needs_w1 else None
        grad_x = input_gradient(inner, weight1, through) if needs_x else None
    return [grad_x, grad_w1, grad_b1, grad_w2, grad_b2]


_linear, _feed_forward = plain_apply(_Linear), plain_apply(_FeedForward)


def _differentiable_gradients(
    ctx: Any, grad: Tensor, through: Tensor | None
) -> list[Tensor | None]:
    """Compute gradients of the five inputs that can be differentiated again; torch backend."""
    if ctx.triton:
        raise RuntimeError(NO_DOUBLE_BACKWARD.format("the feed-forward block"))
    *inputs, _, _, kept = ctx.saved_tensors
    x, weight1, bias1, weight2, bias2 = inputs
    needs = ctx.needs_input_grad[:5]
    with torch.enable_grad():
        hidden = activate_aten(F.linear(x.to(weight1.dtype), weight1, bias1), ctx.activation)
        if kept is not None:
            hidden = dropped_again(hidden, kept, ctx.p)
        output = F.linear(hidden, weight2, bias2)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    grads = [next(found) if need else None for need in needs]
    if grads[0] is not None and through is not None:
        grads[0] = grads[0] + through
    return grads
