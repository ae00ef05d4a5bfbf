"""Norm and look up rows by ATen, and sum the gradients of their parameters in float32.

ATen's CPU kernels add one row after another to a sum in the dtype of the rows: for a bfloat16 input
the gradient of LayerNorm's bias, or of a row that many tokens look up, stops growing where an
addend is less than half a step of the sum. Of 8,192 rows whose gradients have a mean of half their
spread, a bias keeps a quarter. Parameters in float32 do not help there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal.tracing import may_be_batched
from fusedformer.ops._registered import plain_apply
from fusedformer.ops._shared import must_see_operators

Shape = tuple[int, ...]


def layer_norm(
    input: Tensor, shape: Shape, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Compute ``torch.layer_norm``; its parameters have the input's dtype, or float32."""
    if not _sums_in_half(input, weight, bias):
        return torch.layer_norm(input, shape, weight, bias, eps)
    if must_see_operators():
        return _wide_layer_norm(input, shape, weight, bias, eps).to(input.dtype)
    normed: Tensor = _layer_norm(input, shape, weight, bias, eps)
    return normed


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Compute ``torch.nn.functional.embedding``."""
    if not _sums_in_half(weight, weight) or must_see_operators():
        return F.embedding(ids, weight, padding_idx)
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += weight.shape[0]
    found: Tensor = _embedding(ids, weight, padding_idx)
    return found


def _sums_in_half(rows: Tensor, *parameters: Tensor | None) -> bool:
    if not torch.is_grad_enabled() or rows.dtype not in (torch.bfloat16, torch.float16):
        return False
    return rows.device.type == "cpu" and any(p is not None and p.requires_grad for p in parameters)


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _wide_layer_norm(
    input: Tensor, shape: Shape, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return torch.layer_norm(input.float(), shape, _wide(weight), _wide(bias), eps)


class _LayerNorm(torch.autograd.Function):
    """``layer_norm``, with statistics and the sums of its gradients in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        shape: Shape,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        output, mean, rstd = torch.native_layer_norm(input, shape, _wide(weight), _wide(bias), eps)
        ctx.shape, ctx.eps = shape, eps
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        given = input, weight, bias
        needs = [ctx.needs_input_grad[at] for at in (0, 2, 3)]
        if torch.is_grad_enabled() or may_be_batched():
            wanted = [t for t, needed in zip(given, needs, strict=True) if needed]
            with torch.enable_grad():
                again = _wide_layer_norm(input, ctx.shape, weight, bias, ctx.eps)
            twice = torch.is_grad_enabled()
            left = iter(torch.autograd.grad(again, wanted, grad.float(), create_graph=twice))
            grads = [next(left) if needed else None for needed in needs]
        else:
            sums = torch.ops.aten.native_layer_norm_backward(
                grad.float(),
                input.float(),
                ctx.shape,
                mean,
                rstd,
                _wide(weight),
                _wide(bias),
                needs,
            )
            grads = [
                s.to(t.dtype) if needed else None
                for s, t, needed in zip(sums, given, needs, strict=True)
            ]
        return grads[0], None, grads[1], grads[2], None


class _Embedding(torch.autograd.Function):
    """``embedding``, with the sums of its gradient in float32."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.count, ctx.dtype, ctx.padding_idx = weight.shape[0], weight.dtype, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        return None, summed_by_id(grad, ids, ctx.count, ctx.padding_idx), None


def summed_by_id(grad: Tensor, ids: Tensor, count: int, padding_idx: int) -> Tensor:
    """Sum rows of ``grad`` over equal ids, as ``[count, *]`` in its dtype; differentiable."""
    wide = grad.float() if grad.device.type == "cpu" else grad  # a GPU's kernels sum in float32
    found: Tensor = torch.ops.aten.embedding_dense_backward(wide, ids, count, padding_idx, False)
    return found.to(grad.dtype)


_layer_norm, _embedding = plain_apply(_LayerNorm), plain_apply(_Embedding)
