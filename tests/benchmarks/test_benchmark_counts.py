"""Bytes and FLOPs that are counted are those worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.benchmarks.square import CPU

from harness import counting
from model import TABLES, floors, outcomes
from suites import bench_attention

# Floors that were worked out by hand for an H200: 4300 GB/s, 790 TFLOP/s, 16,384 tokens, bf16.
BY_HAND = {
    # 4 tensors of 16384 * 768 * 2 bytes = 100.7 MB
    "residual + LayerNorm": (
        counting.layer_norm(16384, 768, 2, residual=True, return_sum=True)["forward"],
        23.4,
    ),
    # 3 tensors = 75.5 MB
    "LayerNorm backward": (counting.layer_norm(16384, 768, 2)["backward"], 17.6),
    # 4 * 16384 * 4096 * 768 = 206.2 GFLOP
    "attention S=4096": (counting.attention(4, 12, 4096, 64, 2)["forward"], 261.0),
    # 14 * 16384 * 512 * 768 FLOPs against 13 tensors of 25.2 MB, which take less
    "attention forward and backward S=512": (counting.attention(32, 12, 512, 64, 2)["both"], 114.2),
    # 4 tensors of 25.2 MB, more than 4 * 16384 * 128 * 768 FLOPs take
    "attention S=128": (counting.attention(128, 12, 128, 64, 2)["forward"], 23.4),
    # keys and values, 2 * 33.6 MB
    "attention of 1 query": (counting.attention(2, 16, 1, 64, 2, keys=8192)["forward"], 15.6),
    # queries and outputs of 32768 tokens, keys and values of the 16384 real ones: 201.3 MB
    "attention, half padded": (
        counting.attention(256, 16, 128, 64, 2, real_keys=16384, pairs=0)["forward"],
        46.8,
    ),
    # as S=128 above, and 12 * 128 * 128 * 2 bytes of bias: read, read again and written
    "attention with a bias": (
        counting.attention(128, 12, 128, 64, 2, bias_bytes=12 * 2**15)["backward"],
        47.2,
    ),
    # 2 * 8192 * 8192 * 512 FLOPs a product: one forward, three backward
    "contrastive forward": (counting.contrastive(8192, 512, 2)["forward"], 87.0),
    "contrastive": (counting.contrastive(8192, 512, 2)["both"], 347.9),
    "scaled sum": (counting.scaled_sum(16384, 768, 2)["forward"], 17.6),  # 3 * 25.2 MB
    "rotary": (counting.rotary(8, 16, 2048, 64, 2)["forward"], 31.3),  # 4 * 33.6 MB, tables
    "softmax": (counting.softmax(32768, 1024, 2)["forward"], 31.2),  # 2 * 67.1 MB
    "cross entropy": (counting.cross_entropy(8192, 50257, 2)["forward"], 191.5),  # 823.4 MB
    # 3 products of 2 * 8192 * 50257 * 768 = 632.4 GFLOP
    "projection and loss": (
        counting.linear_cross_entropy(8192, 8192, 50257, 768, 2)["both"],
        2401.4,
    ),
    # GFLOP: 11 layers 7653.6 + 992.1 of attention, the last one's keys and values 116.0, its other
    # products and the head's of 32 * 77 rows 95.9, its attention 13.6, the projection 346.5
    "masked language modelling, a step": (
        counting.masked_lm([512] * 32, [77] * 32, 12, 768, 12, 3072, 30522, 2)["step"],
        11668.1,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_floor_agrees_with_the_one_worked_out_by_hand(name: str) -> None:
    cost, floor = BY_HAND[name]
    assert round(cost.floor_us(4300.0, 790.0), 1) == floor


@pytest.mark.parametrize("kind", bench_attention.LENGTHS)
def test_attention_counts_exactly_the_visible_pairs(kind: str) -> None:
    batch, heads, length, dim = 4, 16, 24, 64
    case = bench_attention._case(kind, batch * length, length, dim, torch.float32, headline=True)
    inputs = case.make(CPU)
    if kind == "packed":
        counts = inputs["cu_seqlens"].diff().tolist()
        own = torch.block_diag(*(torch.ones(count, count) for count in counts)).bool()
        visible = own.expand(heads, -1, -1)
    else:
        rows = inputs["query"].shape[2]
        distance = torch.arange(length) - torch.arange(rows)[:, None]
        visible = torch.ones(*inputs["query"].shape[:2], rows, length, dtype=torch.bool)
        if kind == "causal":
            visible = visible & (distance <= 0)
        if case.options["window"] is not None:
            visible = visible & (distance.abs() <= case.options["window"])
        if "key_lengths" in inputs:
            visible = visible & inputs["key_mask"][:, None, None, :]
            assert torch.equal(inputs["key_lengths"], inputs["key_mask"].sum(-1).int())
        if kind == "boolean mask":
            visible = visible & inputs["attn_mask"]
    assert case.costs["forward"].flops == 4 * visible.sum().item() * dim
    assert visible.any(-1).all()  # no row of a benchmark is masked whole


@pytest.mark.parametrize("length", bench_attention.EVERY)
def test_natural_lengths_fill_half_of_the_padded_batch(length: int) -> None:
    lengths = bench_attention.natural_lengths(16384, length)
    assert lengths == bench_attention.natural_lengths(16384, length)
    assert max(lengths) == lengths[0] == length
    assert min(lengths) >= 1
    assert len(set(lengths)) > len(lengths) // 8
    assert 0.45 <= sum(lengths) / len(lengths) / length <= 0.55
    assert abs(sum(lengths) / 16384 - 1) < 0.1


def test_flops_of_windows_and_gated_feed_forwards() -> None:
    def flops(**settings: Any) -> int:
        return counting.encoder([8, 5], 2, 4, 1, 6, 4, **settings)["forward"].flops

    seen = sum(abs(i - j) <= 2 for n in (8, 5) for i in range(n) for j in range(n))
    assert flops() - flops(windows=[2, 2]) == 2 * 4 * 4 * (64 + 25 - seen)
    assert flops(windows=[None, 100]) == flops()
    assert flops(gated=True) - flops() == 2 * 13 * 2 * 4 * 6
    assert flops() - flops(causal=True) == 2 * 4 * 4 * (8 * 7 + 5 * 4) // 2
    # One head of 6 columns has products of 4 x 6, and scores of 6 columns in place of 4.
    assert flops(head_dim=6) - flops() == 2 * (2 * 13 * 4 * 4 * 2 + 4 * 2 * (64 + 25))


def test_flops_with_all_tokens_labelled_are_those_of_an_encoder_and_a_head() -> None:
    shape = (3, 8, 2, 12)
    found = counting.masked_lm([7, 4], [7, 4], *shape, 50, 4)
    whole = counting.encoder([7, 4], *shape, 4)
    head = 2 * 11 * 8 * 8 + 2 * 11 * 8 * 50
    assert found["forward"].flops == whole["forward"].flops + head
    assert found["step"].flops == whole["step"].flops + 3 * head


@pytest.mark.parametrize("suite", ["softmax", "norm", "attention", "losses"])
def test_the_table_of_floors_is_what_its_command_writes(suite: str) -> None:
    written = (TABLES / "floors.md").read_text().splitlines()
    assert floors.rows(suite) == [row for row in written if row.startswith(f"| {suite} |")]


def test_the_table_of_outcomes_is_what_its_command_writes() -> None:
    assert outcomes.text() == (TABLES / "outcomes.md").read_text()
