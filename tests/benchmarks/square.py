"""A suite of one small case, the square of a tensor, with whatever providers are given."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness import counting, records
from harness.case import REFERENCE, Case, Inputs, Program, Sizes, Suite
from harness.runner import Options, run_suite

CPU = torch.device("cpu")


def run_options(**changes: Any) -> Options:
    return Options(CPU, seconds=0.001, say=lambda line: None, **changes)


def new_results(path: Path | None = None) -> records.ResultFile:
    results = records.ResultFile(path, records.new_document(CPU, {}))
    results.set_ceilings({"copy_gb_s": 10.0, "matmul_tflop_s": 0.1, "matmul_dtype": "float32"})
    return results


def square_case(name: str = "4x8") -> Case:
    def make(device: torch.device) -> Inputs:
        return {"input": torch.randn(4, 8, device=device).requires_grad_()}

    return Case("square", name, torch.float32, make, counting.softmax(4, 8, 4))


def square_suite(
    others: dict[str, Callable[[torch.Tensor], torch.Tensor]], cases: list[Case] | None = None
) -> Suite:
    def of(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return lambda case: Program(lambda input: function(input))

    stock = of(torch.square)
    given = {REFERENCE: stock, **{name: of(function) for name, function in others.items()}}
    return Suite(
        "square",
        lambda sizes, dtype: cases or [square_case()],
        lambda device, compile: given,
        lambda case, device: stock(case),
    )


def measured_square() -> dict[str, Any]:
    """Give a document that a test may change; it was measured once."""
    return copy.deepcopy(_measured_once())


@functools.cache
def _measured_once() -> dict[str, Any]:
    results = new_results()
    suite = square_suite({"fusedformer": lambda x: x * x})
    run_suite(suite, suite.cases(Sizes.of("tiny"), torch.float32), results, run_options())
    for record in results.document["records"]:
        record["p20_us"], record["p80_us"] = 0.9 * record["median_us"], 1.1 * record["median_us"]
    return results.document
