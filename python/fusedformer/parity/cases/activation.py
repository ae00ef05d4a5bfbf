"""List cases of bias and activation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import functional, reference
from fusedformer.parity.cases.case import Case, Op, normal


def _stock_activation(input: Tensor, bias: Tensor, activation: str) -> Tensor:
    x = input + bias
    if activation.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.relu(x) if activation == "relu" else F.silu(x)


def _stock_gated(input: Tensor, bias: Tensor, activation: str, activates: str) -> Tensor:
    a, b = (input + bias).chunk(2, -1)
    if activates == "second":
        a, b = b, a
    return _stock_activation(a, a.new_zeros(()), activation) * b


def activation_cases() -> Iterator[Case]:
    op = Op(
        "bias_activation", functional.bias_activation, _stock_activation, reference.bias_activation
    )
    for activation in functional.ACTIVATIONS:
        shapes = normal(input=(13, 130), bias=(130,))
        yield Case(op, activation, shapes, {"activation": activation}, activation == "gelu")
    gated = Op(
        "gated_activation",
        functional.gated_activation,
        _stock_gated,
        reference.gated_activation,
    )
    for activation in functional.ACTIVATIONS:
        shapes = normal(input=(13, 260), bias=(260,))
        for activates in ("first", "second") if activation == "gelu" else ("first",):
            options = {"activation": activation, "activates": activates}
            is_quick = activation == "gelu" and activates == "first"
            yield Case(gated, f"{activation}, {activates} half", shapes, options, is_quick)
