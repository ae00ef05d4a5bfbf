"""Compute cross entropy of given logits: the op, its autograd, its backends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import no_double_backward
from fusedformer.ops.softmax import softmax


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`fusedformer.functional.cross_entropy`; the loss is of ``dtype``."""
    if chosen_backend(input) == "torch":
        if weight is not None and dtype == input.dtype:
            weight = weight.to(input.dtype)
        return F.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    checks.check_kernel_dtype("cross_entropy", "input", input)
    if target.is_floating_point():
        losses = _losses_of_probabilities(input, target, weight, label_smoothing)
        return _reduced(losses, reduction).to(torch.promote_types(dtype, target.dtype))
    logits = input.movedim(class_dim(input), -1)
    loss: Tensor = _cross_entropy(
        logits, target.flatten(), weight, ignore_index, label_smoothing, reduction, dtype
    )[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def class_dim(input: Tensor) -> int:
    """Return the dimension of the classes, as torch has it."""
    return 0 if input.dim() == 1 else 1


def total_weight(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Sum the weights of the rows that are not ignored, which a mean divides by, in float32."""
    kept = target != ignore_index
    if weight is None:
        return kept.sum(dtype=torch.float32)
    weights = weight.to(torch.promote_types(weight.dtype, torch.float32))
    index = torch.where(kept, target, 0).clamp(0, weight.shape[0] - 1)
    return torch.where(kept, weights.index_select(0, index), 0.0).sum()


def weight_sum(weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    """Sum all class weights, if label smoothing needs the sum."""
    if weight is None or not label_smoothing:
        return None
    return weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))


def _losses_of_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """Compute losses for targets that are probabilities, by the kernel of log_softmax."""
    dim = class_dim(input)
    log_probabilities = softmax(
        input, dim, scale=1.0, mask=None, is_causal=False, dtype=torch.float32, log=True
    )
    wanted = target.float()
    if label_smoothing:
        wanted = wanted * (1.0 - label_smoothing) + label_smoothing / input.shape[dim]
    if weight is not None:
        wanted = wanted * weight.view(-1, *(1,) * (input.dim() - dim - 1))
    return -(log_probabilities * wanted).sum(dim)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


@registered(
    "cross_entropy",
    schema="(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
    "float label_smoothing, str reduction, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
)
def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Return (loss, statistics of the rows, divisor of a mean) for ``input`` ``[..., C]``."""
    from fusedformer_kernels.rows.cross_entropy import cross_entropy_rows

    losses, statistics = cross_entropy_rows(
        input, target, weight, weight_sum(weight, label_smoothing), ignore_index, label_smoothing
    )
    if reduction == "none":
        return losses.to(dtype), statistics, None
    if reduction == "sum":
        return losses.sum().to(dtype), statistics, None
    total = total_weight(target, weight, ignore_index)
    return (losses.sum() / total).to(dtype), statistics, total


@_cross_entropy.register_fake
def _cross_entropy_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, statistics = target.shape, torch.float32
    return (
        input.new_empty(rows if reduction == "none" else (), dtype=dtype),
        input.new_empty((2, *rows), dtype=statistics),
        input.new_empty((), dtype=statistics) if reduction == "mean" else nothing(input),
    )


@registered(
    "cross_entropy_backward",
    schema="(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor statistics, "
    "Tensor? total, int ignore_index, float label_smoothing) -> Tensor",
)
def _cross_entropy_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    total: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    from fusedformer_kernels.rows.cross_entropy import cross_entropy_gradient

    return cross_entropy_gradient(
        input,
        target,
        weight,
        weight_sum(weight, label_smoothing),
        statistics,
        grad if total is None else grad / total,
        ignore_index,
        label_smoothing,
        first_class=0,
        n_classes=input.shape[-1],
    )


@_cross_entropy_backward.register_fake
def _cross_entropy_backward_fake(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    total: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return input.new_empty(input.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    input, target, weight, ctx.ignore_index, ctx.label_smoothing, ctx.reduction, _ = inputs
    _, statistics, total = output
    ctx.save_for_backward(input, target, weight, statistics, total)
    ctx.mark_non_differentiable(*(t for t in (statistics, total) if t is not None))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    input, target, weight, statistics, total = ctx.saved_tensors
    found = _cross_entropy_backward(
        grad,
        input,
        target,
        weight,
        statistics,
        total if ctx.reduction == "mean" else None,
        ctx.ignore_index,
        ctx.label_smoothing,
    )
    return found, *(None,) * 6


_cross_entropy.register_autograd(_backward, setup_context=_save)
_cross_entropy_backward.register_autograd(no_double_backward("cross_entropy"))
