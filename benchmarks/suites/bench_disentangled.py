"""Disentangled attention of DeBERTa v3's sizes: 512 buckets of distances, whole and padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness import counting
from harness.attention_peers import real_positions
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.providers import compiled, present
from suites.bench_attention import natural_lengths

HEADS, DIM, BUCKETS, MAX_DISTANCE = 12, 64, 512, 512
HEADLINE = ("full", 512)


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List about ``sizes.tokens`` real tokens in sequences of each length."""
    if sizes.name == "tiny":
        return [_case(kind, sizes.tokens, 32, dtype) for kind in ("full", "key padding")]
    return [
        _case(kind, sizes.tokens, length, dtype)
        for kind in ("full", "key padding")
        for length in (128, 512, 2048)
        if length <= sizes.tokens
    ]


def _case(kind: str, tokens: int, length: int, dtype: torch.dtype) -> Case:
    lengths = [length] * (tokens // length)
    if kind == "key padding":
        lengths = natural_lengths(tokens, length)
    batch = len(lengths)

    def make(device: torch.device) -> Inputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        names = "query", "key", "value"
        inputs: Inputs = {
            name: draw(batch, length, HEADS, DIM).transpose(1, 2).requires_grad_() for name in names
        }
        for name in ("position_key", "position_query"):
            inputs[name] = draw(HEADS, BUCKETS, DIM).requires_grad_()
        if kind == "key padding":
            inputs["key_mask"] = real_positions(lengths, length, device)
        return inputs

    mean = sum(lengths) / batch / length
    return Case(
        "disentangled",
        f"disentangled {kind} B={batch} H={HEADS} S={length} d={DIM} mean/max={mean:.2f}",
        dtype,
        make,
        counting.disentangled(
            batch, HEADS, length, DIM, BUCKETS, dtype.itemsize, real_keys=sum(lengths)
        ),
        headline=(kind, length) == HEADLINE or length < 128,
        part=_two_heads,
    )


def _two_heads(tensor: Tensor) -> Tensor:
    """Take the first and the last head: the tables' gradients are sums over all sequences."""
    if tensor.dim() == 4:
        return tensor[:, :: HEADS - 1]
    return tensor[:: HEADS - 1] if tensor.dim() == 3 else tensor


def fused(case: Case) -> Program:
    """Call the library's op."""
    from fusedformer import functional as F

    return Program(lambda **x: F.disentangled_attention(**x, max_distance=MAX_DISTANCE))


def eager(case: Case) -> Program:
    """Compute it as transformers does, by products and gathers."""
    from fusedformer.parity.cases import stock_disentangled

    return Program(lambda **x: stock_disentangled(**x, max_distance=MAX_DISTANCE))


def truth(case: Case, device: torch.device) -> Program:
    """Compute the library's definition, but for its copies of the tables: as :func:`eager`."""
    return eager(case)


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    found: dict[str, Any] = {
        "fusedformer": fused,
        REFERENCE: eager,
        "torch.compile": lambda case: compiled(eager(case)),
    }
    return present(found, device, compile)


SUITE = Suite("disentangled", cases, providers, truth)


def test_disentangled(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
