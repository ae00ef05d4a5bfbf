"""The ATen backend, stock's compositions and the definitions are the same functions.

In float32 a difference of meaning could hide in rounding, and stock would hide it from the parity
criterion if it shared it. In float64 it cannot: all agree to half of its digits or more.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from fusedformer import backend, functional, reference
from fusedformer.parity import run_case
from fusedformer.parity.cases import Case, all_cases
from fusedformer.testing import parity

CASES = {f"{case.op.name}, {case.name}": case for case in all_cases()}
CPU = torch.device("cpu")


def in_float64(case: Case) -> Case:
    """With the epsilon given: its default is that of the dtype, and the truth keeps float32's."""
    if "rms_norm" in case.op.name:
        return dataclasses.replace(case, settings={"eps": 1e-6, **case.settings})
    return case


@pytest.mark.parametrize("name", CASES)
def test_all_three_agree_in_float64(name: str) -> None:
    with backend("torch"):
        records = run_case(in_float64(CASES[name]), torch.float64, CPU)
    for record in records:
        bound = torch.finfo(torch.float64).eps ** 0.5 * record["largest"]
        assert max(record["error"], record["stock_error"]) <= bound, record["tensor"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_parity_in_each_dtype(name: str, dtype: torch.dtype) -> None:
    with backend("torch"):
        for record in run_case(CASES[name], dtype, CPU):
            assert record["passed"], record["fault"]


def drawn_attention(draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and settings of a random attention: rank, broadcasts, heads, masks and lengths."""
    rank = draw.choice([2, 3, 4, 5])
    batch = [draw.choice([1, 2, 3]) for _ in range(rank - 2)]
    grouped = rank > 2 and draw.random() < 0.3
    q, k, v = ([n if draw.random() < 0.8 else 1 for n in batch] for _ in range(3))
    if grouped:
        k[-1] = v[-1] = draw.choice([1, 2])
        q[-1] = k[-1] * draw.choice([1, 2, 3])
        batch = [*torch.broadcast_shapes(q[:-1], k[:-1], v[:-1]), q[-1]]
    else:
        batch = list(torch.broadcast_shapes(q, k, v))
    length, keys = draw.choice([1, 3, 7]), draw.choice([0, 1, 5, 8])
    dim, value_dim = draw.choice([1, 4, 8]), draw.choice([1, 6, 8])
    inputs: dict[str, Any] = {
        "query": torch.randn(*q, length, dim),
        "key": torch.randn(*k, keys, dim),
        "value": torch.randn(*v, keys, value_dim),
    }
    shape = [n if draw.random() < 0.6 else 1 for n in (*batch, length, keys)]
    shape = shape[draw.randrange(len(shape)) :]
    kind = draw.choice(["none", "boolean", "additive", "removing"])
    if kind == "boolean":
        inputs["attn_mask"] = torch.rand(shape) < 0.6
    elif kind != "none":
        share = 0.4 if kind == "removing" else 0.0
        inputs["attn_mask"] = torch.randn(shape).masked_fill(torch.rand(shape) < share, -torch.inf)
    rows = torch.Size(batch[:-1] if rank > 3 or grouped else batch).numel()
    if draw.random() < 0.3:
        inputs["key_mask"] = torch.rand(rows, keys) < 0.6
    if draw.random() < 0.3:
        inputs["key_lengths"] = torch.randint(0, keys + 1, (rows,))
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    scale = draw.choice([None, -0.7, 2.0])
    return inputs, {"is_causal": draw.random() < 0.4, "enable_gqa": grouped, "scale": scale}


@pytest.mark.parametrize("seed", range(60))
def test_drawn_attention_agrees_in_float64(seed: int) -> None:
    """Masks, lengths and causality in all combinations, rows without keys among them."""
    torch.manual_seed(seed)
    inputs, settings = drawn_attention(random.Random(seed))

    def ours(**tensors: Any) -> Any:
        with backend("torch"):
            return functional.scaled_dot_product_attention(**tensors, **settings, return_lse=True)

    def truth(**tensors: Any) -> Any:
        return reference.scaled_dot_product_attention(**tensors, **settings)

    for found in parity(ours, truth, truth, inputs, dtype=torch.float64):
        # Sums of a few terms of size 1, so what is left of a gradient that cancels is as small.
        bound = torch.finfo(torch.float64).eps ** 0.5 * max(found.largest, 1.0)
        assert found.error <= bound, (found.fault, settings)
