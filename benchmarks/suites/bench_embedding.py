"""Token, position and type embeddings, their norm and dropout: the entry of an encoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.providers import compiled, present

WIDTHS = (384, 768, 1024)
HEADLINE = 768
TOKENS, POSITIONS, TYPES = 30522, 512, 2  # BERT's
P = 0.1
_PAIRS = (("input", "weight"), ("position_ids", "position_weight"),
          ("token_type_ids", "token_type_weight"))  # fmt: skip


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List ``sizes.tokens`` tokens of each width; dropout, as in training, at one of them."""
    tiny = sizes.name == "tiny"
    tokens = 500 if tiny else TOKENS
    found = [
        _case(sizes.tokens, width, 0.0, dtype, tokens)
        for width in ((HEADLINE,) if tiny else WIDTHS)
    ]
    return [*found, _case(sizes.tokens, HEADLINE, P, dtype, tokens)]


def _case(rows: int, width: int, p: float, dtype: torch.dtype, tokens: int) -> Case:
    counts = tokens, POSITIONS, TYPES

    def make(device: torch.device) -> Inputs:
        inputs: Inputs = {}
        for (ids, table), count in zip(_PAIRS, counts, strict=True):
            inputs[ids] = torch.randint(count, (rows,), device=device)
            inputs[table] = torch.randn(count, width, device=device, dtype=dtype).requires_grad_()
        for name in ("norm_weight", "norm_bias"):
            inputs[name] = torch.randn(width, device=device, dtype=dtype).requires_grad_()
        return inputs

    dropped = f", dropout {p}" if p else ""
    return Case(
        "embedding",
        f"{tokens} words {rows}x{width}{dropped}",
        dtype,
        make,
        counting.embedding(rows, width, counts, dtype.itemsize),
        {"p": p},
        headline=width == HEADLINE,
    )


def fused(case: Case) -> Program:
    """Call the library's op, one kernel forward."""
    from fusedformer import functional as F

    def embed(p: float) -> Any:
        return lambda **inputs: F.embedding_layer_norm(**inputs, p=p)

    return Program(embed(case.options["p"]), checked=embed(0.0))


def eager(case: Case) -> Program:
    """Call torch step by step."""

    def embed(p: float) -> Any:
        def call(norm_weight: Tensor, norm_bias: Tensor, **inputs: Tensor) -> Tensor:
            word, position, kind = (torch_F.embedding(inputs[i], inputs[t]) for i, t in _PAIRS)
            total = word + kind + position
            normed = torch_F.layer_norm(total, total.shape[1:], norm_weight, norm_bias)
            return torch_F.dropout(normed, p) if p else normed

        return call

    return Program(embed(case.options["p"]), checked=embed(0.0))


def truth(case: Case, device: torch.device) -> Program:
    """Compute the library's definition, without dropout."""
    from fusedformer import reference

    return Program(reference.embedding_layer_norm)


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    found: dict[str, Any] = {
        "fusedformer": fused,
        REFERENCE: eager,
        "torch.compile": lambda case: compiled(eager(case)),
    }
    return present(found, device, compile)


SUITE = Suite("embedding", cases, providers, truth)


def test_embedding(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
