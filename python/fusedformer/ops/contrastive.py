"""Compute contrastive losses: the ops, their autograd, backends, and ranks that share a batch.

The registered ops return log-sum-exps of rows and columns; a loss is a short sum of them. Where
each rank has a part of a column, torch's own operations merge and differentiate the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_off
from fusedformer._internal.backend import chosen_backend
from fusedformer.ops import collectives
from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import is_transformed, no_double_backward
from fusedformer.ops.contrastive_aten import (
    row_and_column_lse_aten,
    row_and_column_lse_plain,
    score_gradients_aten,
    softplus_sums_aten,
    softplus_sums_plain,
)


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    label_offset: int,
    reduction: str,
    group: Any,
) -> Tensor:
    """See :func:`fusedformer.functional.contrastive_loss`."""
    name = "contrastive_loss"
    backend, a, b, scale = _prepared(name, a, b, logit_scale)
    if group is None:
        row, column, matched = _lse(a, b, scale, label_offset, backend)
        column = column[label_offset : label_offset + a.shape[0]]
    else:
        collectives.check_equal_shapes(name, a, group)
        b = collectives.all_gather(b, group)
        row, column, matched = _lse(a, b, scale, group.rank() * a.shape[0], backend)
        # Each rank has its rows' part of every column; a rank collects the parts of its columns.
        parts = collectives.all_to_all(column, group).view(group.size(), a.shape[0])
        column = parts.logsumexp(0)
    return _reduced((row + column) * 0.5 - matched, reduction, group)


def sigmoid_contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    label_offset: int,
    reduction: str,
    group: Any,
) -> Tensor:
    """See :func:`fusedformer.functional.sigmoid_contrastive_loss`."""
    name = "sigmoid_contrastive_loss"
    backend, a, b, scale = _prepared(name, a, b, logit_scale)
    bias = _scalar(logit_bias, scale)
    if group is not None:
        collectives.check_equal_shapes(name, a, group)
        b, label_offset = collectives.all_gather(b, group), group.rank() * a.shape[0]
    losses = _softplus(a, b, scale, bias, label_offset, backend)
    return _reduced(losses, reduction, group)


def _prepared(
    name: str, a: Tensor, b: Tensor, logit_scale: float | Tensor
) -> tuple[str, Tensor, Tensor, Tensor]:
    """Choose the backend, and cast a, b and scale to the dtypes that it computes with."""
    backend = chosen_backend(a)
    if backend == "triton":
        checks.check_kernel_dtype(name, "a", a)
    wide = torch.promote_types(a.dtype, torch.float32)
    scale = _scalar(logit_scale, a.new_empty((), dtype=wide))
    if backend == "torch":  # ATen rounds a product to the dtype of its factors
        a, b = a.to(wide), b.to(wide)
    return backend, a, b, scale


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like.dtype).reshape(())
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _reduced(losses: Tensor, reduction: str, group: Any) -> Tensor:
    if reduction == "none":
        return losses
    if group is None:
        return losses.mean() if reduction == "mean" else losses.sum()
    if reduction == "mean":
        losses = losses / (losses.shape[0] * group.size())
    return collectives.all_reduce(losses.sum(), group)


def _lse(
    a: Tensor, b: Tensor, scale: Tensor, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if is_transformed():
        return row_and_column_lse_plain(a, b, scale, offset)
    row, column, matched = _row_and_column_lse(a, b, scale, offset, backend)
    return row, column, matched


def _softplus(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, offset: int, backend: str
) -> Tensor:
    if is_transformed():
        return softplus_sums_plain(a, b, scale, bias, offset)[0]
    found: Tensor = _softplus_sums(a, b, scale, bias, offset, backend)
    return found


@registered(
    "row_and_column_lse",
    schema="(Tensor a, Tensor b, Tensor scale, SymInt offset, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def _row_and_column_lse(
    a: Tensor, b: Tensor, scale: Tensor, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exps of rows and columns of ``scale * a @ b.T``, and its matched scores."""
    if backend == "torch":
        with autocast_off(a):
            return row_and_column_lse_aten(a, b, scale, offset)
    from fusedformer_kernels.rows.contrastive import row_and_column_lse

    return row_and_column_lse(a, b, scale, offset)


@_row_and_column_lse.register_fake
def _row_and_column_lse_fake(
    a: Tensor, b: Tensor, scale: Tensor, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = a.shape[0], b.shape[0]
    return scale.new_empty(rows), scale.new_empty(columns), scale.new_empty(rows)


@registered(
    "softplus_sums",
    schema="(Tensor a, Tensor b, Tensor scale, Tensor bias, SymInt offset, str backend) -> Tensor",
)
def _softplus_sums(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, offset: int, backend: str
) -> Tensor:
    """Return the sigmoid loss of each row."""
    if backend == "torch":
        with autocast_off(a):
            return softplus_sums_aten(a, b, scale, bias, offset)
    from fusedformer_kernels.rows.contrastive import softplus_sums

    return softplus_sums(a, b, scale, bias, offset)


@_softplus_sums.register_fake
def _softplus_sums_fake(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, offset: int, backend: str
) -> Tensor:
    return scale.new_empty(a.shape[0])


@registered(
    "pairs_backward",
    schema="(Tensor row_grad, Tensor? column_grad, Tensor? matched_grad, Tensor a, Tensor b, "
    "Tensor scale, Tensor? bias, Tensor? row, Tensor? column, SymInt offset, bool[] needs, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _pairs_backward(
    row_grad: Tensor,
    column_grad: Tensor | None,
    matched_grad: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    offset: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a, b, scale and bias; None where ``needs`` says False.

    For one strip of scores at a time, a kernel or ATen computes their gradients, and torch the
    products of those.
    """
    if backend == "torch":
        gradients: Callable[..., Any] = score_gradients_aten
    else:
        from fusedformer_kernels.rows.contrastive import score_gradients as gradients
    needs_a, needs_b, needs_scale, needs_bias = needs
    grads = [None if g is None else g.contiguous() for g in (row_grad, column_grad, matched_grad)]
    unit = None
    if a.dtype == torch.float16 and a.shape[0]:
        # Gradients of a mean over thousands of pairs would underflow in float16.
        largest = [g.abs().amax() for g in grads if g is not None]
        unit = torch.stack(largest).amax().clamp_(min=1e-30)
        grads = [None if g is None else g / unit for g in grads]
    factor = scale if unit is None else scale * unit
    a_grad = torch.empty_like(a) if needs_a else None
    scale_grad = scale.new_zeros(()) if needs_scale else None
    bias_grad = scale.new_zeros(()) if needs_bias else None
    b_sums = None
    with autocast_off(a):
        for rows, ds in gradients(a, b, scale, bias, offset, grads, (row, column), bias_grad):
            if needs_b:
                part = _wide_product(ds.T, a[rows])
                b_sums = part if b_sums is None else b_sums.add_(part)
            if needs_a or (needs_scale and not needs_b):
                sums = _wide_product(ds, b)
                if a_grad is not None:
                    torch.mul(sums, factor, out=a_grad[rows])
                if scale_grad is not None and not needs_b:
                    scale_grad += (sums * a[rows]).sum()
    b_grad = torch.zeros_like(b) if needs_b else None
    if b_grad is not None and b_sums is not None:
        if scale_grad is not None:
            scale_grad = (b_sums * b).sum()
        torch.mul(b_sums, factor, out=b_grad)
    if unit is not None:
        scale_grad, bias_grad = (None if t is None else t * unit for t in (scale_grad, bias_grad))
    return a_grad, b_grad, scale_grad, bias_grad


@_pairs_backward.register_fake
def _pairs_backward_fake(
    row_grad: Tensor,
    column_grad: Tensor | None,
    matched_grad: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    offset: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    found = torch.empty_like(a), torch.empty_like(b), scale.new_empty(()), scale.new_empty(())
    return tuple(t if need else nothing(a) for t, need in zip(found, needs, strict=True))


def _wide_product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y``, in float32 if the factors are in half precision."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return x @ y
    if x.device.type == "cpu":
        return x.float() @ y.float()
    if torch.version.hip is not None:
        return (x @ y).float()
    return torch.mm(x, y, out_dtype=torch.float32)


def _save_lse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, scale, ctx.offset, ctx.backend = inputs
    ctx.save_for_backward(a, b, scale, *output[:2])


def _lse_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    a, b, scale, row, column = ctx.saved_tensors
    if ctx.backend == "torch" and torch.is_grad_enabled():
        inputs = a, b, scale
        return (*_by_autograd(ctx, row_and_column_lse_plain, inputs, grads), None, None)
    needs = [*ctx.needs_input_grad[:3], False]
    found = _pairs_backward(*grads, a, b, scale, None, row, column, ctx.offset, needs, ctx.backend)
    wanted = (g if need else None for g, need in zip(found[:3], needs, strict=False))
    return (*wanted, None, None)


def _save_softplus(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.offset, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _softplus_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if ctx.backend == "torch" and torch.is_grad_enabled():
        return (*_by_autograd(ctx, softplus_sums_plain, inputs, (grad,)), None, None)
    needs = list(ctx.needs_input_grad[:4])
    found = _pairs_backward(grad, None, None, *inputs, None, None, ctx.offset, needs, ctx.backend)
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None)


def _by_autograd(
    ctx: Any, function: Callable[..., Any], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again, computed from all scores at once."""
    needs = ctx.needs_input_grad[: len(inputs)]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    outputs = function(*inputs, ctx.offset)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return [next(found) if need else None for need in needs]


_row_and_column_lse.register_autograd(_lse_backward, setup_context=_save_lse)
_softplus_sums.register_autograd(_softplus_backward, setup_context=_save_softplus)
_pairs_backward.register_autograd(no_double_backward("contrastive losses"))
