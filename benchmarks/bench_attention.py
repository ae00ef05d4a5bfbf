"""Self-attention: plain, causal, key-padded, with a boolean mask, with dropout."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.check import check_kept_share
from harness.providers import (
    SDPA_BACKENDS,
    flash_attn,
    flex_attention,
    present,
    sdpa,
    xformers_attention,
)

WIDTH = 1024  # heads times head dim
P = 0.1
# kind: lengths of the sequences
LENGTHS = {
    "full": (128, 512, 2048, 4096, 8192),
    "causal": (512, 2048, 4096, 8192),
    "key padding": (512, 2048, 4096),
    "boolean mask": (2048, 4096),
    "dropout": (512, 2048),
}
HEADLINE = {
    ("full", 512, 64), ("full", 4096, 64), ("full", 4096, 128), ("causal", 4096, 64),
    ("key padding", 512, 64), ("boolean mask", 2048, 64), ("dropout", 2048, 64),
}


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """``sizes.tokens`` tokens in sequences of each length, with heads of 64 and of 128."""
    if sizes.name == "tiny":
        return [_case(kind, sizes.tokens, 32, 64, dtype, headline=True) for kind in LENGTHS]
    return [
        _case(kind, sizes.tokens, length, dim, dtype, headline=(kind, length, dim) in HEADLINE)
        for kind, lengths in LENGTHS.items()
        for dim in (64, 128)
        for length in lengths
        if length <= sizes.tokens
    ]


def _case(
    kind: str, tokens: int, length: int, dim: int, dtype: torch.dtype, *, headline: bool
) -> Case:
    batch, heads = tokens // length, WIDTH // dim
    # Lengths spread evenly between a quarter and all of the longest: five eighths on average.
    real = [length // 4 + 3 * length * (2 * i + 1) // (8 * batch) for i in range(batch)]
    window = length // 8

    def make(device: torch.device) -> Inputs:
        def draw() -> Tensor:  # as a projection leaves it: heads are strided, not contiguous
            rows = torch.randn(batch, length, heads, dim, device=device, dtype=dtype)
            return rows.transpose(1, 2).requires_grad_()

        inputs = {"query": draw(), "key": draw(), "value": draw()}
        positions = torch.arange(length, device=device)
        if kind == "key padding":
            inputs["key_mask"] = positions < torch.tensor(real, device=device)[:, None]
        if kind == "boolean mask":
            near = (positions[:, None] - positions).abs() <= window
            inputs["attn_mask"] = near[None, None]
        return inputs

    pairs, mask_bytes = length * length * batch * heads, 0
    if kind == "causal":
        pairs = length * (length + 1) // 2 * batch * heads
    elif kind == "key padding":
        pairs, mask_bytes = sum(real) * length * heads, batch * length
    elif kind == "boolean mask":
        near = sum(min(i, window) + min(length - 1 - i, window) + 1 for i in range(length))
        pairs, mask_bytes = near * batch * heads, length * length
    p = P if kind == "dropout" else 0.0
    return Case(
        "attention", f"{kind} B={batch} H={heads} S={length} d={dim}", dtype, make,
        counting.attention(
            batch, heads, length, dim, dtype.itemsize, pairs=pairs, mask_bytes=mask_bytes
        ),
        {"kind": kind, "is_causal": kind == "causal", "p": p},
        headline,
        part=_first_and_last_head_of_last_sequence,
        before=_check_dropout if p else None,
    )


def _first_and_last_head_of_last_sequence(tensor: Tensor) -> Tensor:
    """What the truth is computed for: all scores of all heads in float64 would not fit.

    Masks that all sequences or heads share keep their size of 1.
    """
    heads = tensor.shape[1] if tensor.dim() == 4 else 1
    return tensor[-1:, :: heads - 1] if heads > 1 else tensor[-1:]


def fused(case: Case) -> Program:
    """The library's op, which takes key padding as it comes."""
    from fusedformer import functional as F

    def attention(p: float) -> Callable[..., Tensor]:
        return functools.partial(
            F.scaled_dot_product_attention, dropout_p=p, is_causal=case.options["is_causal"]
        )

    return Program(attention(case.options["p"]), checked=attention(0.0))


def stock(backend: Any = None) -> Provider:
    """torch's attention; key padding has to become a mask over the scores, which broadcasts."""

    def build(case: Case) -> Program:
        run = sdpa(backend)

        def attention(p: float) -> Callable[..., Tensor]:
            def call(
                query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None,
                attn_mask: Tensor | None = None,
            ) -> Tensor:
                mask = attn_mask if key_mask is None else key_mask[:, None, None, :]
                return run(query, key, value, mask, p, case.options["is_causal"])

            return call

        return Program(attention(case.options["p"]), checked=attention(0.0))

    return build


def truth(case: Case, device: torch.device) -> Program:
    """The library's definition, without dropout and without the log-sum-exp."""
    from fusedformer import reference

    causal = case.options["is_causal"]
    return Program(
        lambda **inputs: reference.scaled_dot_product_attention(**inputs, is_causal=causal)[0]
    )


def _check_dropout(program: Program, inputs: Inputs) -> None:
    """Dropout drops the asked share, and the backward drops what the forward dropped.

    With zero queries every weight is 1/S. Values that are a row of the identity for some of the
    keys then show those keys' weights alone: 0 where dropped, 1/(S (1 - p)) where kept. And the
    output is linear in the values, hence <output, g> = <values, gradient of values> if, and only
    if, both directions used one mask.
    """
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    eps = torch.finfo(value.dtype).eps
    length, shown = key.shape[2], min(value.shape[2:])
    picks = torch.arange(shown, device=value.device)
    with torch.no_grad():
        one_hot = torch.zeros_like(value)
        one_hot[:, :, picks * (length // shown), picks] = 1.0
        weights = program.function(query=query * 0, key=key, value=one_hot)[..., :shown].double()
    kept = weights > 0
    check_kept_share(kept.double().mean().item(), kept.numel(), P)
    if (weights[kept] * length * (1 - P) - 1).abs().max() > 4 * eps:
        raise AssertionError(f"a kept weight is not scaled by 1 / {1 - P}")
    output = program.function(query=query, key=key, value=value)
    grad = torch.randn_like(output)
    (value_grad,) = torch.autograd.grad(output, [value], grad)
    left = output.detach().double() * grad
    right = value.detach().double() * value_grad
    # Both sums carry independent roundings of relative size eps.
    slack = 8 * eps * (left.norm() + right.norm())
    if not (left.sum() - right.sum()).abs() <= slack:
        raise AssertionError("the backward's dropout mask is not the forward's")


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """Who computes it, those that are here; each of SDPA's backends is a peer by name."""
    found: dict[str, Any] = {
        "fusedformer": fused,
        REFERENCE: stock(),
        **{name: stock(backend) for name, backend in SDPA_BACKENDS.items()},
        "FlexAttention": flex_attention,
        "flash_attn": flash_attn,
        "xformers": xformers_attention,
    }
    return present(found, device, compile)


SUITE = Suite("attention", cases, providers, truth)


def test_attention(benchmark: Any, contest: Any) -> None:
    """One provider of one case in one direction; see conftest.py."""
    contest(benchmark)
