"""bias + activation + dropout: the definition."""

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
    """``dropout(activation(input + bias))`` with the given dropout mask."""
    x = input if bias is None else input + bias
    if activation == "relu":
        y = torch.relu(x)
    elif activation == "silu":
        y = x * torch.sigmoid(x)
    elif activation == "gelu":
        y = 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
    else:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
        y = 0.5 * x * (1.0 + torch.tanh(inner))
    return dropped(y, p, keep)
