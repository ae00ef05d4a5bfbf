"""Steps between the products of newer layers: rotary embedding, and sums with LayerScale."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.providers import compiled, present

LENGTH, WIDTH = 512, 1024  # of a sequence, and of all heads
ROTARY: dict[str, tuple[int, str | None]] = {  # head dim, norm of heads
    "rotary 64": (64, None), "rotary 128, RMS norm": (128, "rms"),
}  # fmt: skip
SCALED = (768, 1024)
HEADLINE = "rotary 64", "scaled sum 768"
EPS = 1e-6


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List ``sizes.tokens`` tokens of each step."""
    if sizes.name == "tiny":
        return [_rotary("rotary 64", 1, sizes.tokens, 64, dtype), _scaled(sizes.tokens, 768, dtype)]
    length = min(LENGTH, sizes.tokens)
    batch = sizes.tokens // length
    found = [_rotary(name, batch, length, WIDTH, dtype) for name in ROTARY]
    return found + [_scaled(sizes.tokens, width, dtype) for width in SCALED]


def _rotary(name: str, batch: int, length: int, width: int, dtype: torch.dtype) -> Case:
    dim, norm = ROTARY[name]
    heads = width // dim

    def make(device: torch.device) -> Inputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

        inputs: Inputs = {n: draw(batch, length, heads, dim) for n in ("query", "key")}
        frequencies = 10000.0 ** -(torch.arange(dim // 2, device=device) / (dim // 2))
        angles = torch.arange(length, device=device)[:, None] * frequencies
        inputs |= {"cos": angles.cos(), "sin": angles.sin()}
        if norm:
            inputs |= {"query_weight": draw(dim), "key_weight": draw(dim)}
        return inputs

    costs = counting.rotary(batch, heads, length, dim, dtype.itemsize, normed=norm is not None)
    options = {"step": "rotary", "norm": norm}
    shape = f"B={batch} S={length} H={heads}"
    return Case("steps", f"{name} {shape}", dtype, make, costs, options, name in HEADLINE)


def _scaled(tokens: int, width: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Inputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

        rows = draw(tokens, width), draw(tokens, width)
        parameters = {"scale": draw(width), "input_bias": draw(width)}
        return {"input": rows[0], "residual": rows[1], **parameters}

    name = f"scaled sum {width}"
    costs = counting.scaled_sum(tokens, width, dtype.itemsize)
    options = {"step": "scaled sum"}
    return Case("steps", f"{name} {tokens} rows", dtype, make, costs, options, name in HEADLINE)


def _by(functions: Any, case: Case) -> Program:
    """Call the functions of a module: the library's, or their definitions."""
    if case.options["step"] == "scaled sum":
        return Program(functions.dropout_scale_add)
    norm = case.options["norm"]

    def call(query: Tensor, key: Tensor, **others: Tensor) -> Any:
        heads = (x.transpose(1, 2) for x in (query, key))
        return functions.rotary_embedding(*heads, **others, norm=norm, eps=EPS)

    return Program(call)


def fused(case: Case) -> Program:
    """Call the library's op, one kernel."""
    from fusedformer import functional

    return _by(functional, case)


def truth(case: Case, device: torch.device) -> Program:
    """Compute the library's definition."""
    from fusedformer import reference

    return _by(reference, case)


def eager(case: Case) -> Program:
    """Call torch step by step, as models of transformers and timm do."""
    if case.options["step"] == "scaled sum":
        return Program(
            lambda input, residual, scale, input_bias: residual + scale * (input + input_bias)
        )
    norm = case.options["norm"]

    def turned(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> Tensor:
        x = x.transpose(1, 2)
        if norm:
            x = torch_F.rms_norm(x, x.shape[-1:], weight, EPS)
        cos, sin = (torch.cat((table, table), -1).to(x.dtype) for table in (cos, sin))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def call(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, **weights: Tensor) -> Any:
        return tuple(
            turned(x, cos, sin, weights.get(name))
            for x, name in ((query, "query_weight"), (key, "key_weight"))
        )

    return Program(call)


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    found: dict[str, Any] = {
        "fusedformer": fused,
        REFERENCE: eager,
        "torch.compile": lambda case: compiled(eager(case)),
    }
    return present(found, device, compile)


SUITE = Suite("steps", cases, providers, truth)


def test_steps(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
