"""What a call costs the host: eager ops beside torch's own, on inputs so small that nothing else
counts. On a GPU it is the time to enqueue a call, on the CPU all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.providers import present

ROWS, WIDTH, HEADS = 16, 64, 2


def _functions(library: str) -> dict[str, Callable[..., Tensor]]:
    """List this library's or torch's functions by op."""
    if library == "torch":
        f: Any = torch_F
        fused_norm = lambda x, residual, weight: torch_F.layer_norm(x + residual, (WIDTH,), weight)
        activation = lambda x, weight: torch_F.gelu(x + weight)
    else:
        from fusedformer import functional

        f = functional
        fused_norm = lambda x, residual, weight: functional.dropout_add_layer_norm(
            x, residual, (WIDTH,), weight
        )
        activation = lambda x, weight: functional.bias_activation(x, weight, "gelu")
    return {
        "softmax": lambda x: f.softmax(x, -1),
        "layer_norm": lambda x, weight: f.layer_norm(x, (WIDTH,), weight),
        "residual + layer_norm": fused_norm,
        "bias + gelu": activation,
        "attention": lambda q, k, v: f.scaled_dot_product_attention(q, k, v),
    }


INPUTS = {
    "softmax": ("x",), "layer_norm": ("x", "weight"), "bias + gelu": ("x", "weight"),
    "residual + layer_norm": ("x", "residual", "weight"), "attention": ("q", "k", "v"),
}  # fmt: skip
LAYER = "encoder layer"


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List the ops on small inputs, the same at every size."""
    costs = counting.softmax(ROWS, WIDTH, dtype.itemsize)
    found = [
        Case("host", op, dtype, _maker(names, dtype), costs, {"op": op}, headline=True)
        for op, names in INPUTS.items()
    ]
    cost = counting.encoder([8, 8], 1, WIDTH, HEADS, 2 * WIDTH, dtype.itemsize)
    both = {"forward": cost["forward"], "both": cost["step"]}
    return [
        *found,
        Case("host", LAYER, dtype, _maker(("x",), dtype), both, {"op": LAYER}, headline=True),
    ]


def _maker(names: tuple[str, ...], dtype: torch.dtype) -> Callable[[torch.device], Inputs]:
    shapes = {"x": (2, 8, WIDTH), "residual": (2, 8, WIDTH), "weight": (WIDTH,)}

    def make(device: torch.device) -> Inputs:
        return {
            name: torch.randn(
                shapes.get(name, (2, HEADS, 8, 32)), device=device, dtype=dtype
            ).requires_grad_()
            for name in names
        }

    return make


def _layer(case: Case, library: Any, device: torch.device) -> Program:
    torch.manual_seed(1)
    stock = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, device=device, dtype=case.dtype
    )
    layer = library.TransformerEncoderLayer(
        WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, device=device, dtype=case.dtype
    )
    layer.load_state_dict(stock.state_dict())
    return Program(lambda x: layer(x), layer)


def fused(case: Case, device: torch.device) -> Program:
    """Call the library's op or layer."""
    from fusedformer import nn

    if case.options["op"] == LAYER:
        return _layer(case, nn, device)
    return Program(_functions("fusedformer")[case.options["op"]])


def eager(case: Case, device: torch.device) -> Program:
    """Call torch's."""
    if case.options["op"] == LAYER:
        return _layer(case, torch.nn, device)
    return Program(_functions("torch")[case.options["op"]])


def truth(case: Case, device: torch.device) -> Program:
    """Compute torch's in float64."""
    program = eager(case, device)
    if program.module is None:
        return program
    module = copy.deepcopy(program.module).double()
    return Program(lambda x: module(x), module)


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List the library and torch."""
    found: dict[str, Provider] = {
        "fusedformer": lambda case: fused(case, device),
        REFERENCE: lambda case: eager(case, device),
    }
    return present(found, device, compile)


SUITE = Suite("host", cases, providers, truth, clock="host")


def test_host(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
