"""Bias and activation of the feed-forward block, and the gradients of both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.providers import compiled, present

WIDTHS = (3072, 4096)  # feed-forward of the base and the large encoder
ACTIVATIONS = ("gelu", "gelu_tanh", "relu")


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List ``sizes.tokens`` rows of each width."""
    return [
        _case(activation, sizes.tokens, width, dtype)
        for width in (WIDTHS[:1] if sizes.name == "tiny" else WIDTHS)
        for activation in ACTIVATIONS
    ]


def _case(activation: str, rows: int, width: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Inputs:
        return {
            "input": torch.randn(rows, width, device=device, dtype=dtype).requires_grad_(),
            "bias": torch.randn(width, device=device, dtype=dtype).requires_grad_(),
        }

    return Case(
        "activation",
        f"bias + {activation} {rows}x{width}",
        dtype,
        make,
        counting.bias_activation(rows, width, dtype.itemsize),
        {"activation": activation},
        headline=activation == "gelu",
    )


def fused(case: Case) -> Program:
    """Call the library's op."""
    from fusedformer import functional as F

    return Program(lambda input, bias: F.bias_activation(input, bias, case.options["activation"]))


def eager(case: Case) -> Program:
    """Call torch's addition and activation."""
    activation = case.options["activation"]

    def call(input: Tensor, bias: Tensor) -> Tensor:
        total = input + bias
        if activation == "relu":
            return torch_F.relu(total)
        return torch_F.gelu(total, approximate="tanh" if activation == "gelu_tanh" else "none")

    return Program(call)


def truth(case: Case, device: torch.device) -> Program:
    """Compute the library's definition."""
    from fusedformer import reference

    return Program(
        lambda input, bias: reference.bias_activation(input, bias, case.options["activation"])
    )


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    found: dict[str, Any] = {
        "fusedformer": fused,
        REFERENCE: eager,
        "torch.compile": lambda case: compiled(eager(case)),
    }
    return present(found, device, compile)


SUITE = Suite("activation", cases, providers, truth)


def test_activation(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
