"""Compute cross entropy of a product without holding all its logits in memory.

The products are torch's. The loss of a chunk of logits overwrites them by their gradient. The
gradients of inputs and weights are computed in one of two places:

- *in the forward*, by chunks of rows: logits, loss and both products of their gradient, while the
  chunk is in memory. Three products. The weight's gradient is added up in at least float32.
- *in the backward*, by blocks of classes, whose logits are computed again: four products. For
  ``reduction="none"``, where the rows' factors come with the backward; for float16, which
  underflows where the loss scale has not yet multiplied the gradients; and in bfloat16 where a
  float32 sum of the weight's size would undo much of the saving (:func:`gradients_in_forward`).

Peak memory beyond inputs and results, with N rows not ignored, C classes, D features, s bytes an
element: a chunk of logits, at most N C s / 4 (on the CPU N C s / 8, and in half precision twice
that in float32; all of them if N <= D in half precision), and in half precision 4 C D for the
float32 sum, or 4 N D for that of the input's gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_off
from fusedformer._internal.backend import chosen_backend
from fusedformer._internal.tracing import is_traced_by_jit
from fusedformer.ops._registered import nothing, registered, saved_may_be_overwritten
from fusedformer.ops._shared import is_transformed, no_double_backward
from fusedformer.ops.cross_entropy import cross_entropy, total_weight, weight_sum
from fusedformer.ops.logit_chunks import (
    ChunkLoss,
    each_block,
    gradients_in_forward,
    rows_at_once,
    wide_dtype,
)
from fusedformer.ops.product import add_product


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    static_shapes: bool,
    dtype: torch.dtype,
    loss_dtype: torch.dtype,
) -> Tensor:
    """See :func:`fusedformer.functional.linear_cross_entropy`; products in ``dtype``."""
    triton = chosen_backend(input) == "triton"
    if triton:
        checks.check_kernel_dtype("linear_cross_entropy", "input", input)
    rows = input.reshape(-1, input.shape[-1])
    # torch.jit cannot record the lists of flags that the op takes.
    composed = is_traced_by_jit() or (not triton and is_transformed())
    if target.is_floating_point() or composed:
        targets = target.reshape(rows.shape[0], *target.shape[input.dim() - 1 :])
        loss = cross_entropy(
            F.linear(rows, linear_weight, linear_bias),
            targets,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            loss_dtype,
        )
        return loss.reshape(input.shape[:-1]) if reduction == "none" else loss
    found = _linear_cross_entropy(
        rows, linear_weight, target.flatten(), linear_bias, weight, dtype, loss_dtype,
        reduction, ignore_index, label_smoothing, static_shapes, triton,
        [torch.is_grad_enabled() and t is not None and t.requires_grad
         for t in (input, linear_weight, linear_bias)],
    )  # fmt: skip
    loss = found[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def _rows_not_ignored(target: Tensor, ignore_index: int, static_shapes: bool) -> Tensor | None:
    """Return the rows that are not ignored, or None for all.

    It waits for the GPU, except while a CUDA graph is captured.
    """
    if static_shapes or (target.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    rows = (target != ignore_index).nonzero().squeeze(1)
    return None if rows.shape[0] == target.shape[0] else rows


_SETTINGS = (
    "ScalarType dtype, ScalarType loss_dtype, str reduction, int ignore_index, "
    "float label_smoothing, bool static_shapes, bool triton, bool[] needs"
)


def _without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Switch autocast off around an op: its caller has chosen the dtypes."""

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        with autocast_off(args[0]):
            return run(*args)

    return call


@registered(
    "linear_cross_entropy",
    schema="(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
    f"Tensor? weight, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@_without_autocast
def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
    loss_dtype: torch.dtype,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    static_shapes: bool,
    triton: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return (loss, statistics of the rows, divisor of a mean, three gradients).

    Products are computed in ``dtype``. Gradients are None where the backward computes them.
    """
    (every, features), wide = input.shape, wide_dtype(dtype)
    loss = ChunkLoss(
        weight, weight_sum(weight, label_smoothing), ignore_index, label_smoothing, triton
    )
    rows = _rows_not_ignored(target, ignore_index, static_shapes)
    total = total_weight(target, weight, ignore_index).to(wide) if reduction == "mean" else None
    losses = input.new_zeros(every, dtype=wide)
    statistics = input.new_zeros((2, every), dtype=wide)
    now = any(needs) and gradients_in_forward(every, features, dtype, reduction)
    grads: list[Tensor | None] = [None] * 3
    if any(needs) and not now:
        # By blocks, as the backward will: logits from other products would have other bits.
        kept: slice | Tensor = slice(None) if rows is None else rows
        x, targets = input[kept].to(dtype), target[kept]
        state = loss.new_state(x.shape[0], x)

        def add_losses(block: slice, matrix: Tensor, logits: Tensor) -> None:
            found = loss.rows_loss(
                logits, targets, None, block.start, linear_weight.shape[0], state
            )
            if block.stop == linear_weight.shape[0]:
                losses[kept], statistics[:, kept] = found

        each_block(loss, x, linear_weight, linear_bias, add_losses)
    else:
        factor = None
        if now:
            factor = input.new_ones((), dtype=wide) if total is None else total.reciprocal()
        tensors = input, linear_weight, linear_bias
        wanted = [now and need for need in needs]
        summed = _by_rows(loss, tensors, target, rows, factor, wanted, losses, statistics, dtype)
        # Only now: the memory of the logits is free again.
        for i, tensor in enumerate(tensors):
            found = summed[i]
            if tensor is not None and found is not None:
                grads[i] = found.to(tensor.dtype)
    if reduction != "none":
        losses = losses.sum() if total is None else losses.sum() / total
    return losses.to(loss_dtype), statistics, total, *grads


def _by_rows(
    loss: ChunkLoss,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    rows: Tensor | None,
    factor: Tensor | None,
    wanted: list[bool],
    losses: Tensor,
    statistics: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Fill ``losses`` and ``statistics`` by chunks of rows, and return the sums of gradients."""
    input, linear_weight, linear_bias = tensors
    (every, features), classes, wide = input.shape, linear_weight.shape[0], wide_dtype(dtype)
    count = every if rows is None else rows.shape[0]
    step = rows_at_once(count, classes, features, dtype, input.device.type, not loss.triton)
    matrix = linear_weight.to(dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    summed = dtype if count <= step and linear_weight.dtype == dtype else wide
    input_grad = torch.zeros_like(input) if wanted[0] else None
    weight_grad = linear_weight.new_zeros(matrix.shape, dtype=summed) if wanted[1] else None
    bias_grad = linear_weight.new_zeros(classes, dtype=wide) if wanted[2] else None
    buffer = loss.buffer(min(step, count), classes, matrix)

    def compute(chunk: slice | Tensor) -> None:  # a function, so that its tensors are freed
        x = input[chunk].to(dtype)
        logits = loss.logits(x, matrix, bias, buffer)
        losses[chunk], statistics[:, chunk] = loss.rows_loss(logits, target[chunk], factor)
        if input_grad is not None:
            input_grad[chunk] = (logits @ matrix).to(input.dtype)
        if weight_grad is not None:
            add_product(weight_grad, logits.t(), x)
        if bias_grad is not None:
            bias_grad.add_(logits.sum(0, dtype=wide))

    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        compute(part if rows is None else rows[part])
    return input_grad, weight_grad, bias_grad


@_linear_cross_entropy.register_fake
def _linear_cross_entropy_fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
    loss_dtype: torch.dtype,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    static_shapes: bool,
    triton: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    (rows, features), wide = input.shape, wide_dtype(dtype)
    now = any(needs) and gradients_in_forward(rows, features, dtype, reduction)
    grads = [
        nothing(input) if t is None or not (now and need) else t.new_empty(t.shape)
        for t, need in zip((input, linear_weight, linear_bias), needs, strict=True)
    ]
    return (
        input.new_empty(rows if reduction == "none" else (), dtype=loss_dtype),
        input.new_empty((2, rows), dtype=wide),
        input.new_empty((), dtype=wide) if reduction == "mean" else nothing(input),
        *grads,
    )


@registered(
    "linear_cross_entropy_backward",
    schema="(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
    f"Tensor? weight, Tensor statistics, Tensor? total, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
@_without_autocast
def _linear_cross_entropy_backward(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    statistics: Tensor,
    total: Tensor | None,
    dtype: torch.dtype,
    loss_dtype: torch.dtype,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    static_shapes: bool,
    triton: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of input, weight and bias, computed by blocks of classes."""
    wide = wide_dtype(dtype)
    loss = ChunkLoss(
        weight, weight_sum(weight, label_smoothing), ignore_index, label_smoothing, triton
    )
    rows = _rows_not_ignored(target, ignore_index, static_shapes)
    kept: slice | Tensor = slice(None) if rows is None else rows
    x, targets = input[kept].to(dtype), target[kept]
    statistics = statistics[:, kept].contiguous()
    factor = grad.to(wide) if total is None else grad.to(wide) / total
    if factor.dim():
        factor = factor[kept]
    found = torch.zeros(x.shape, dtype=wide, device=x.device) if needs[0] else None
    weight_grad = torch.empty_like(linear_weight) if needs[1] else None
    bias_grad = None
    if needs[2] and linear_bias is not None:
        bias_grad = torch.empty_like(linear_bias)

    def add_gradients(block: slice, matrix: Tensor, logits: Tensor) -> None:
        first, classes = block.start, linear_weight.shape[0]
        loss.gradient_(logits, targets, statistics, factor, first, classes)
        if found is not None:
            add_product(found, logits, matrix)
        if weight_grad is not None:
            weight_grad[block] = logits.t() @ x
        if bias_grad is not None:
            bias_grad[block] = logits.sum(0, dtype=wide)

    each_block(loss, x, linear_weight, linear_bias, add_gradients)
    input_grad = None
    if found is not None:
        input_grad = found.to(input.dtype)
        if rows is not None:
            input_grad = torch.zeros_like(input).index_copy_(0, rows, input_grad)
    return input_grad, weight_grad, bias_grad


@_linear_cross_entropy_backward.register_fake
def _linear_cross_entropy_backward_fake(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, ...]:
    needs = settings[-1]
    like = input, linear_weight, linear_bias
    return tuple(
        nothing(input) if t is None or not need else torch.empty_like(t)
        for t, need in zip(like, needs, strict=True)
    )


@registered(
    "linear_cross_entropy_scaled",
    schema="(Tensor grad, Tensor? input_grad, Tensor? weight_grad, Tensor? bias_grad) "
    "-> (Tensor, Tensor, Tensor)",
)
def _scaled(grad: Tensor, *computed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Multiply the gradients that the forward computed by that of the loss."""
    return tuple(None if t is None else t * grad for t in computed)


@_scaled.register_fake
def _scaled_fake(grad: Tensor, *computed: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(nothing(grad) if t is None else torch.empty_like(t) for t in computed)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    tensors, ctx.settings = inputs[:5], inputs[5:]
    _, statistics, total, *grads = output
    dtype, _, ctx.reduction, *_, ctx.triton, needs = ctx.settings
    (rows, features) = inputs[0].shape
    ctx.now = any(needs) and gradients_in_forward(rows, features, dtype, ctx.reduction)
    # The torch backend can be differentiated again, from the inputs themselves.
    kept = (None,) * 5 if ctx.now and ctx.triton else tensors
    ctx.save_for_backward(*kept, statistics, total, *(grads if ctx.now else (None,) * 3))
    ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
    ctx.set_materialize_grads(False)  # else autograd makes zeros of the size of all gradients


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    *tensors, statistics, total, input_grad, weight_grad, bias_grad = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[3]]
    if not ctx.triton and torch.is_grad_enabled():
        found = _differentiable_gradients(ctx, grad, tensors, needs)
    elif ctx.now and saved_may_be_overwritten():
        found = [None if t is None else t.mul_(grad) for t in (input_grad, weight_grad, bias_grad)]
    elif ctx.now:
        if torch.is_grad_enabled() and not grad.requires_grad:
            grad = grad.detach().requires_grad_()  # so that a double backward is refused
        found = _scaled(grad, input_grad, weight_grad, bias_grad)
    else:
        found = _linear_cross_entropy_backward(
            grad,
            *tensors,
            statistics,
            total if ctx.reduction == "mean" else None,
            *ctx.settings[:-1],
            needs,
        )
    first, second, third = (t if need else None for t, need in zip(found, needs, strict=True))
    return first, second, None, third, *(None,) * 9


def _differentiable_gradients(
    ctx: Any, grad: Tensor, tensors: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again, from all logits at once."""
    input, linear_weight, target, linear_bias, weight = tensors
    assert input is not None and linear_weight is not None and target is not None
    dtype, loss_dtype, reduction, ignore_index, label_smoothing, *_ = ctx.settings
    inputs = input, linear_weight, linear_bias
    with torch.enable_grad():
        bias = None if linear_bias is None else linear_bias.to(dtype)
        logits = F.linear(input.to(dtype), linear_weight.to(dtype), bias).to(loss_dtype)
        loss = cross_entropy(
            logits, target, weight, ignore_index, reduction, label_smoothing, loss_dtype
        )
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)
_linear_cross_entropy_backward.register_autograd(no_double_backward("linear_cross_entropy"))
_scaled.register_autograd(no_double_backward("linear_cross_entropy"))
