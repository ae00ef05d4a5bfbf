"""Define bias, activation and dropout in one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedformer.reference.norm import dropped


def bias_activation(
    input: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Compute ``dropout(activation(input + bias))`` with the given dropout mask.

    Args:
        input: ``[..., d]``.
        bias: ``[d]``, or None.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"``, ``"relu"`` or ``"silu"``.
        p: probability with which ``keep`` was drawn.
        keep: boolean, the shape of ``input``; None for no dropout.

    Raises:
        ValueError: unknown ``activation``.
    """
    x = input if bias is None else input + bias
    return dropped(_activated("bias_activation", x, activation), p, keep)


def gated_activation(
    input: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    activates: str = "first",
    p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Compute ``dropout(activation(a) * b)`` for the halves a, b of each row of ``input + bias``.

    Args:
        input: ``[..., 2 * d]``.
        bias: ``[2 * d]``, or None.
        activation: as for :func:`bias_activation`.
        activates: ``"second"`` swaps a and b.
        p: probability with which ``keep`` was drawn.
        keep: boolean ``[..., d]``; None for no dropout.

    Raises:
        ValueError: unknown ``activation``.
    """
    x = input if bias is None else input + bias
    a, b = x.chunk(2, -1)
    if activates == "second":
        a, b = b, a
    return dropped(_activated("gated_activation", a, activation) * b, p, keep)


def _activated(function: str, x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        y = torch.relu(x)
    elif activation == "silu":
        y = x * torch.sigmoid(x)
    elif activation == "quick_gelu":
        y = x * torch.sigmoid(1.702 * x)
    elif activation == "gelu":  # x times the normal distribution's cumulative function
        y = x * 0.5 * torch.erfc(-x / math.sqrt(2.0))
    elif activation == "gelu_tanh":
        y = x * 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    else:
        raise ValueError(f"{function}(): unknown activation {activation!r}")
    return y
