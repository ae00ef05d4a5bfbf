"""Judge the numbers, and say in words what passed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """A statement, and whether it is true."""

    name: str
    passed: bool
    detail: str


def checks(result: dict[str, Any]) -> list[Check]:
    """Return all that must hold for the report to pass; times are not judged."""
    found: list[Check] = []
    for dtype, one in result["dtypes"].items():
        found += _of_dtype(dtype, one)
    records = result["ops"]["records"]
    good = sum(record["passed"] for record in records)
    ops = len({record["op"] for record in records})
    where = "Triton kernels" if result["ops"]["backend"] == "triton" else "ATen compositions"
    if result["ops"].get("interpreter"):
        where += " in the interpreter"
    found.append(
        Check(
            "ops",
            good == len(records) > 0,
            f"{good} of {len(records)} outputs and gradients of {ops} ops ({where})",
        )
    )
    return found


def _of_dtype(dtype: str, one: dict[str, Any]) -> list[Check]:
    errors = one["errors"]
    layers, gradients = one["layers"], [g for g in one["gradients"] if g["judged"]]
    good = sum(layer["passed"] for layer in layers)
    right = sum(gradient["passed"] for gradient in gradients)
    ours, stock = one["neighbours"]["fused"], one["neighbours"]["stock"]
    return [
        Check(
            f"{dtype} embeddings",
            errors["passed"],
            f"max error {errors['error']:.2e}, stock's {errors['stock_error']:.2e}",
        ),
        Check(
            f"{dtype} layers",
            good == len(layers),
            f"{good} of {len(layers)} depths within the limit",
        ),
        Check(
            f"{dtype} gradients",
            all(gradient["passed"] for gradient in one["gradients"]),
            f"{right} of {len(gradients)} kinds of parameters within the limit",
        ),
        Check(
            f"{dtype} neighbours",
            ours["beyond_rounding"] == 0,
            f"nearest unchanged for {ours['top1_unchanged']} of {ours['passages']} passages "
            f"(stock {stock['top1_unchanged']}); {ours['beyond_rounding']} changes beyond rounding",
        ),
    ]
