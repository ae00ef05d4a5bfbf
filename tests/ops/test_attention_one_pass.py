"""Attention's backward in one pass over the keys, which no shipped table asks for yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.ops.features import CHOICES, Call
from tests.ops.judge import grad
from torch import Tensor

from fusedformer import functional as F

pytest.importorskip("triton")

from fusedformer_kernels.attention import configs
from fusedformer_kernels.runtime import plans, targets
from fusedformer_kernels.runtime.launch import recorded_launches

attention: Any = F.scaled_dot_product_attention  # called in more ways than its overloads know
varlen_attention: Any = F.varlen_attention
ABSENT = {name: values[0] for name, values in CHOICES.items()}
BLOCK_KEYS = 32  # so that short sequences have several blocks that take turns


@pytest.fixture(autouse=True)
def one_pass(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if a table named it for every kind that asks the tables."""
    original = configs.attention_backward_config

    def config(kind: configs.AttentionKind, target: targets.Target) -> configs.AttentionConfig:
        found = original(kind, target)
        if kind.masked:
            return found
        return replace(found, passes=1, block_m=16, block_n=BLOCK_KEYS, split_keys=False)

    monkeypatch.setattr(configs, "attention_backward_config", config)
    plans.clear()
    yield
    plans.clear()


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"lengths": "cross"},
    "packed, window, bottom right, sinks, lse": {
        "form": "packed", "lengths": "cross", "band": "window", "causal_alignment": "bottom_right",
        "sinks": True, "also": ("lse",), "dtype": torch.float16,
    },
    "causal, key lengths, dropout, grouped heads": {
        "band": "causal", "key_lengths": True, "dropout": True, "group": 2, "dims": (40, 24),
    },
    "left window, bias, slopes, cap": {
        "form": "interleaved", "band": "left window", "relative_bias": 3, "alibi_slopes": "batch",
        "softcap": 2.0, "dtype": torch.bfloat16,
    },
    "empty sequences, key mask": {"lengths": "empty", "key_mask": True, "band": "causal window"},
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, device: str) -> None:
    """Every gradient by the criterion of parity, and in one pass indeed."""
    with recorded_launches(run=True) as launches:
        Call.draw({**ABSENT, **FEATURES[name]}, device).check()
    names = {launch.name for launch in launches}
    assert "_store_query_sums" in names and "_attention_backward_queries" not in names


def launched(device: str, **settings: Any) -> set[str]:
    leaves = [grad(1, 2, 40, 16, device=device) for _ in range(3)]
    output: Tensor = attention(*leaves, **settings)
    with recorded_launches(run=True) as launches:
        output.backward(torch.randn_like(output))
    return {launch.name for launch in launches}


def test_what_keeps_two_passes(device: str) -> None:
    """A mask of pairs, and a call that does not want all three gradients."""
    assert "_attention_backward_queries" not in launched(device)
    for mask in (torch.rand(40, 40, device=device) > 0.4, torch.randn(40, 40, device=device)):
        assert "_store_query_sums" not in launched(device, attn_mask=mask)
    query, key = (grad(1, 2, 40, 16, device=device) for _ in range(2))
    output = attention(query, key, key.detach())
    with recorded_launches(run=True) as launches:
        output.backward(torch.randn_like(output))
    assert "_attention_backward_queries" in {launch.name for launch in launches}


def test_alone_packed_and_planned_are_the_same_bits(device: str) -> None:
    """Sums begin at zero in each call of a plan, and no block of keys is added in another order."""
    lengths = 37, 70
    starts = torch.tensor([0, 37, 107], dtype=torch.int32, device=device)
    whole = torch.randn(3, 107, 2, 16, device=device).half()
    dy = torch.randn(107, 2, 16, device=device).half()

    def gradients(packed: bool, rows: slice = slice(None)) -> list[Tensor]:
        leaves = [x[rows].clone().requires_grad_() for x in whole]
        if packed:
            output = varlen_attention(*leaves, starts, starts, 70, 70, is_causal=True)
        else:
            heads = [leaf.transpose(0, 1)[None] for leaf in leaves]
            output = attention(*heads, is_causal=True)[0].transpose(0, 1)
        return list(torch.autograd.grad(output, leaves, dy[rows]))

    together = gradients(True)
    for _ in range(2):  # recorded, and by the plan
        assert all(torch.equal(a, b) for a, b in zip(together, gradients(True), strict=True))
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        alone = gradients(False, rows)
        assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))
        first += length
