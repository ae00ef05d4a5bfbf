"""Interleaving and memory counting; no test here asserts a time."""

from __future__ import annotations

import torch

from fusedformer.tools import measure

CPU = torch.device("cpu")


def test_programs_take_turns_and_the_first_place_rotates() -> None:
    seen: list[tuple[str, int]] = []
    calls = {
        name: [lambda name=name, i=i: seen.append((name, i)) for i in range(3)]
        for name in ("stock", "fused")
    }
    steps: list[int] = []
    samples = measure.interleaved(calls, 0.0, CPU, lambda: steps.append(1))
    assert [index for _, index in seen] == [0, 0, 1, 1, 2, 2]
    assert [name for name, _ in seen][::2] == ["stock", "fused", "stock"]
    assert len(samples["stock"]) == len(samples["fused"]) == len(steps) == 3


def test_summary_pairs_the_samples() -> None:
    found = measure.summary({"stock": [2.0, 40.0, 6.0], "fused": [1.0, 10.0, 3.0]})
    assert found["speedup"]["median"] == 2.0
    assert found["stock"]["median"] == 6.0
    assert found["fused"]["p20"] <= found["fused"]["median"] <= found["fused"]["p80"]


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    size = 2**20

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(size, dtype=torch.uint8)

    def together() -> object:
        return [torch.empty(size, dtype=torch.uint8) for _ in range(3)]

    assert measure.peak_memory(one_after_the_other, CPU) == size
    assert measure.peak_memory(together, CPU) == 3 * size
