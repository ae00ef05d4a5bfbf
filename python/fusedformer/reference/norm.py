"""Define LayerNorm, RMSNorm and their forms with bias, dropout and residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Compute ``(x - mean) / sqrt(var + eps) * weight + bias``; var has no Bessel correction."""
    dims = tuple(range(-len(normalized_shape), 0))
    mean = input.mean(dims, keepdim=True)
    variance = (input - mean).square().mean(dims, keepdim=True)
    y = (input - mean) / (variance + eps).sqrt()
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Compute ``x / sqrt(mean(x**2) + eps) * weight``; eps defaults to float32's.

    (torch takes the epsilon of the dtype that it computes in: float32 for half precision. The
    truth of a float32 kernel, evaluated in float64, keeps that epsilon.)
    """
    if eps is None:
        eps = torch.finfo(torch.float32).eps
    dims = tuple(range(-len(normalized_shape), 0))
    y = input / (input.square().mean(dims, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def dropped(input: Tensor, p: float, keep: Tensor | None) -> Tensor:
    """Set elements outside ``keep`` to 0, and scale the rest by ``1 / (1 - p)``.

    At p = 1 all are 0. Without ``keep`` nothing is dropped, and then p must be 0.
    """
    if keep is None:
        if p != 0.0:
            raise ValueError(f"dropout with p={p} needs its mask 'keep'")
        return input
    return torch.where(keep, input, 0.0) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def dropout_add(
    input: Tensor,
    residual: Tensor,
    *,
    input_bias: Tensor | None = None,
    p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Compute ``dropout(input + input_bias) + residual`` with the given dropout mask."""
    x = input if input_bias is None else input + input_bias
    return dropped(x, p, keep) + residual


def dropout_scale_add(
    input: Tensor,
    residual: Tensor,
    scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Compute ``sample_scale * scale * dropout(input + input_bias) + residual``.

    ``scale`` has an element a column, ``sample_scale`` one for each index of the first dimension.
    """
    x = dropped(input if input_bias is None else input + input_bias, p, keep)
    if scale is not None:
        x = x * scale
    if sample_scale is not None:
        x = x * sample_scale.view(-1, *[1] * (x.dim() - 1))
    return x + residual


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    input_bias: Tensor | None = None,
    p: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (``layer_norm(sum)``, ``sum = dropout(input + input_bias) + residual``)."""
    total = dropout_add(input, residual, input_bias=input_bias, p=p, keep=keep)
    return layer_norm(total, normalized_shape, weight, bias, eps), total


def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    input_bias: Tensor | None = None,
    p: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (``rms_norm(sum)``, ``sum = dropout(input + input_bias) + residual``)."""
    total = dropout_add(input, residual, input_bias=input_bias, p=p, keep=keep)
    return rms_norm(total, normalized_shape, weight, eps), total
