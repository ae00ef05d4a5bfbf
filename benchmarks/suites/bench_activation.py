"""Bias and activation of the feed-forward block, gated or not, and the gradients of both."""

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
GATED = ("gelu", "silu")  # GeGLU, SwiGLU


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List ``sizes.tokens`` rows of each width."""
    return [
        _case(activation, sizes.tokens, width, dtype, gated=gated)
        for width in (WIDTHS[:1] if sizes.name == "tiny" else WIDTHS)
        for gated in (False, True)
        for activation in (GATED if gated else ACTIVATIONS)
    ]


def _case(activation: str, rows: int, width: int, dtype: torch.dtype, *, gated: bool) -> Case:
    columns = 2 * width if gated else width

    def make(device: torch.device) -> Inputs:
        return {
            "input": torch.randn(rows, columns, device=device, dtype=dtype).requires_grad_(),
            "bias": torch.randn(columns, device=device, dtype=dtype).requires_grad_(),
        }

    count = counting.gated_activation if gated else counting.bias_activation
    return Case(
        "activation",
        f"bias + {'gated ' if gated else ''}{activation} {rows}x{width}",
        dtype,
        make,
        count(rows, width, dtype.itemsize),
        {"activation": activation, "gated": gated},
        headline=activation == "gelu" and not gated,
    )


def fused(case: Case) -> Program:
    """Call the library's op."""
    from fusedformer import functional as F

    function = F.gated_activation if case.options["gated"] else F.bias_activation
    return Program(lambda input, bias: function(input, bias, case.options["activation"]))


def eager(case: Case) -> Program:
    """Call torch's addition and activation, and its product with the other half if gated."""
    activation, gated = case.options["activation"], case.options["gated"]

    def activate(x: Tensor) -> Tensor:
        if activation == "relu":
            return torch_F.relu(x)
        if activation == "silu":
            return torch_F.silu(x)
        return torch_F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")

    def call(input: Tensor, bias: Tensor) -> Tensor:
        if not gated:
            return activate(input + bias)
        first, second = (input + bias).chunk(2, -1)
        return activate(first) * second

    return Program(call)


def truth(case: Case, device: torch.device) -> Program:
    """Compute the library's definition."""
    from fusedformer import reference

    function = reference.gated_activation if case.options["gated"] else reference.bias_activation
    return Program(lambda input, bias: function(input, bias, case.options["activation"]))


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
