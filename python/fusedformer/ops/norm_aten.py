"""Norms on the torch backend: ATen's, or one pass of C++ that adds and norms, and one backward.

Both compute the statistics in float32. ATen rounds the sum before it norms it; C++ norms the sum
that it has, and rounds what it returns of it. ATen adds up gradients of parameters row by row in
float32; C++ adds up rows in doubles.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedformer._internal.tracing import is_eager, may_be_batched
from fusedformer.ops import wide_sums
from fusedformer.ops._registered import plain_apply
from fusedformer.ops.dropout_aten import dropout_add_aten
from fusedformer_kernels.cpu import norm as kernel

Shape = tuple[int, ...]
_PLAIN = Tensor, Parameter
_LEAST_COLUMNS = 32  # fewer leave most lanes of a vector empty
_WORTH_A_NODE = 1 << 17  # elements of a float32 LayerNorm, or Python's part of a gradient is more


def epsilon(eps: float | None) -> float:
    """Return ``eps``, or torch's own: that of float32, in which norms are computed."""
    return torch.finfo(torch.float32).eps if eps is None else eps


def norm_aten(
    kind: str,
    input: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Compute the norm of kind "layer" or "rms", in ``dtype`` if it is given."""
    input = input if dtype is None else input.to(dtype)
    found = _compiled(kind, input, None, shape, weight, bias, eps, wants_sum=False)
    return _by_aten(kind, input, shape, weight, bias, eps) if found is None else found[0]


def add_norm_aten(
    kind: str,
    input: Tensor,
    residual: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    dtype: torch.dtype | None,
    *,
    input_bias: Tensor | None,
    p: float,
    return_sum: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the norm of ``dropout(input + input_bias) + residual``; (norm, sum) if asked."""
    input = input if input_bias is None else input + input_bias.to(input.dtype)
    if not p and dtype in (None, input.dtype) and input.dtype == residual.dtype:
        found = _compiled(kind, input, residual, shape, weight, bias, eps, wants_sum=return_sum)
        if found is not None:
            normed, its_sum = found
            return normed if its_sum is None else (normed, its_sum)
    total = dropout_add_aten(input, residual, p)
    normed = norm_aten(kind, total, shape, weight, bias, eps, dtype)
    return (normed, total) if return_sum else normed


def _by_aten(
    kind: str,
    input: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> Tensor:
    if kind == "rms":
        return torch.rms_norm(input, shape, weight, eps)
    assert eps is not None
    # ATen takes parameters of the dtype of its input, or all float32 with a half input.
    own = input.dtype
    if (weight is not None and weight.dtype != own) or (bias is not None and bias.dtype != own):
        wide = torch.promote_types(input.dtype, torch.float32)
        weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
    return wide_sums.layer_norm(input, shape, weight, bias, eps)


def _compiled(
    kind: str,
    input: Tensor,
    residual: Tensor | None,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    *,
    wants_sum: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """(norm, sum) by C++; None where somebody looks on, or none is compiled."""
    given = input, residual, weight, bias
    if (
        not is_eager()
        or not all(t is None or (type(t) in _PLAIN and t.is_cpu) for t in given)
        or not input.numel()
        or _columns(shape) < _LEAST_COLUMNS
        or not kernel.computes(input.dtype)
        or not _fit(*given, tuple(shape))  # ATen says what does not
    ):
        return None
    if kind == "rms" and weight is not None and weight.dtype is not input.dtype:
        return None  # ATen chooses the dtype of the result
    if torch.is_grad_enabled():
        is_quick = kind == "layer" and input.dtype is torch.float32
        if is_quick and input.numel() < _WORTH_A_NODE:
            return None  # a frozen layer has the bits that it has while it learns
        if any(t is not None and t.requires_grad for t in given):
            normed, total = _norm(*given, shape, eps, kind == "rms")
            return normed, total if wants_sum else None
    return _run(*given, shape, eps, is_rms=kind == "rms", wants_sum=wants_sum)


def _fit(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Shape,
) -> bool:
    return (
        input.shape[-len(shape) :] == shape
        and (residual is None or residual.shape == input.shape)
        and (weight is None or weight.shape == shape)
        and (bias is None or bias.shape == shape)
    )


def _run(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Shape,
    eps: float | None,
    *,
    is_rms: bool,
    wants_sum: bool,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    weight, bias = _parameters(input.dtype, weight, bias)
    return kernel.norm(
        input.contiguous(), None if residual is None else residual.contiguous(), weight, bias,
        _columns(shape), epsilon(eps),
        is_rms=is_rms, wants_sum=wants_sum, statistics=statistics,
    )  # fmt: skip


def _columns(shape: Shape) -> int:
    return shape[0] if len(shape) == 1 else math.prod(shape)


def _parameters(dtype: torch.dtype, *given: Tensor | None) -> list[Tensor | None]:
    """The parameters as C++ takes them: all of the input's dtype, or all float32."""
    wide = any(t is not None and t.dtype is not dtype for t in given)
    return [t if t is None else (t.float() if wide else t).contiguous() for t in given]


class _Norm(torch.autograd.Function):
    """(norm, sum) by C++. The sum is always returned, so that its gradient has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: Shape,
        eps: float | None,
        is_rms: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.eps, ctx.is_rms = shape, eps, is_rms
        rows = input.numel() // _columns(shape)
        statistics = torch.empty(2, rows, dtype=torch.float32, device="cpu")
        normed, total = _run(
            input, residual, weight, bias, shape, eps,
            is_rms=is_rms, wants_sum=True, statistics=statistics,
        )  # fmt: skip
        ctx.save_for_backward(input if total is None else total, weight, bias, statistics)
        return normed, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> Any:
        x, weight, bias, statistics = ctx.saved_tensors
        if grad is None:
            return grad_total, grad_total, *[None] * 5
        wants_input, wants_residual, *wants = ctx.needs_input_grad[:4]
        wants_x = wants_input or wants_residual
        if torch.is_grad_enabled() or may_be_batched():
            dx, *sums = _by_aten_again(ctx, x, weight, bias, grad, [wants_x, *wants])
            if dx is not None and grad_total is not None:
                dx = dx + grad_total
        else:
            own, _ = _parameters(x.dtype, weight, bias)
            parameter = bias if own is None else own
            dx, *sums = kernel.norm_backward(
                grad.contiguous(), None if grad_total is None else grad_total.contiguous(),
                x.contiguous(), own, statistics.contiguous(), is_rms=ctx.is_rms,
                are_parameters_float=parameter is not None and parameter.dtype is torch.float32,
                wants_x=wants_x, wants_parameters=any(wants),
            )  # fmt: skip
        grads = [
            None if own is None or not is_wanted else own.view(ctx.shape).to(t.dtype)
            for own, is_wanted, t in zip(sums, wants, (weight, bias), strict=True)
        ]
        of_input, of_residual = dx if wants_input else None, dx if wants_residual else None
        return of_input, of_residual, *grads, *[None] * 3


def _by_aten_again(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    wants: list[bool],
) -> list[Tensor | None]:
    """Gradients of (x, weight, bias) that can be differentiated or are a batch of them."""
    given = x, weight, bias
    kind = "rms" if ctx.is_rms else "layer"
    with torch.enable_grad():
        again = _by_aten(kind, x, ctx.shape, weight, bias, epsilon(ctx.eps))
    wanted = [t for t, is_wanted in zip(given, wants, strict=True) if is_wanted and t is not None]
    twice = torch.is_grad_enabled()
    left = iter(torch.autograd.grad(again, wanted, grad, create_graph=twice))
    return [next(left) if is_wanted else None for is_wanted in wants]


_norm = plain_apply(_Norm)
