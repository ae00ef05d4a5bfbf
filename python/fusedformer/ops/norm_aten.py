"""Norms on the torch backend: ATen's, or in inference one pass of C++ that adds and norms.

Both compute the statistics in float32. ATen rounds the sum before it norms it; C++, which has no
backward, norms the sum that it has, and rounds what it returns of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedformer._internal.tracing import is_eager
from fusedformer.ops import wide_sums
from fusedformer.ops.dropout_aten import dropout_add_aten
from fusedformer_kernels.cpu import norm as kernel

Shape = tuple[int, ...]
_PLAIN = Tensor, Parameter


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
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    *,
    wants_sum: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """(norm, sum) by C++; None where gradients are on, somebody looks on, or none compiled."""
    dtype = input.dtype
    if (
        dtype not in kernel.DTYPES
        or not is_eager()
        or torch.is_grad_enabled()  # a frozen layer has the bits that it has while it learns
        or not (_is_plain(input) and _is_plain(residual))
        or not (_is_plain(weight) and _is_plain(bias))
        or not input.numel()
    ):
        return None
    if kind == "rms" and weight is not None and weight.dtype is not dtype:
        return None  # ATen chooses the dtype of the result
    input = input.contiguous()
    residual = None if residual is None else residual.contiguous()
    if (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype):
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
    else:
        weight = None if weight is None else weight.float().contiguous()
        bias = None if bias is None else bias.float().contiguous()
    return kernel.norm(
        input, residual, weight, bias, shape[0] if len(shape) == 1 else math.prod(shape),
        epsilon(eps),
        is_rms=kind == "rms", wants_sum=wants_sum,
    )  # fmt: skip


def _is_plain(tensor: Tensor | None) -> bool:
    return tensor is None or (type(tensor) in _PLAIN and tensor.is_cpu)
