"""Latency of one short sequence: an encoder whose launches take longer than its kernels.

What is timed is one call from its start until the device is idle, as a server sees it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.case import REFERENCE, Case, Program, Provider, Sizes, Suite
from harness.encoder_peers import hugging_face
from harness.providers import GRAPHED, REDUCED, present
from suites import bench_encoder

BUCKETS = [(1, 64), (1, 128), (1, 256)]


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List a sequence that fills its bucket, one that is padded to it, and a smaller encoder."""
    if sizes.name == "tiny":
        return [_case("MiniLM", 16, dtype, layers=1, headline=True)]
    if sizes.name == "cpu":
        return [_case("BERT-base", 128, dtype, layers=2, headline=True)]
    return [
        _case("BERT-base", 128, dtype, headline=True), _case("BERT-base", 100, dtype),
        _case("MiniLM", 128, dtype),
    ]  # fmt: skip


def _case(
    name: str, length: int, dtype: torch.dtype, layers: int | None = None, headline: bool = False
) -> Case:
    found = bench_encoder.stack_case(name, "one sequence", [length], dtype, layers)
    costs = {"forward": found.costs["forward"]}
    return replace(found, suite="graphs", costs=costs, headline=headline)


def graphed(case: Case, device: torch.device) -> Program:
    """Call the library's encoder behind CUDA graphs of a few lengths."""
    import fusedformer

    stack = bench_encoder.fused_stack(case, device).eval()
    return Program(fusedformer.graphed(stack, BUCKETS))


def reduced(case: Case, device: torch.device) -> Program:
    """Call torch's encoder compiled into CUDA graphs."""
    program = bench_encoder.eager(device)(case)
    stack: Any = torch.compile(program.module, mode="reduce-overhead", dynamic=False)

    def forward(src: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last call returned is done with
        found: Tensor = stack(src)
        return found

    program.function = program.checked = forward
    return program


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    stock = bench_encoder.eager(device)
    found: dict[str, Provider] = {
        GRAPHED: lambda case: graphed(case, device),
        "fusedformer": lambda case: bench_encoder.program_of(
            bench_encoder.fused_stack(case, device)
        ),
        REFERENCE: stock,
        "Hugging Face sdpa": lambda case: hugging_face(
            bench_encoder.stock_stack(case, device), bench_encoder.program_of, case.options
        ),
        REDUCED: lambda case: reduced(case, device),
    }
    return present(found, device, compile)


SUITE = Suite("graphs", cases, providers, bench_encoder.truth, clock="latency")


def test_graphs(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
