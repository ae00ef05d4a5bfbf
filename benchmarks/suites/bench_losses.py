"""Cross entropy: of given logits, and of projections whose logits need not be in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from harness import counting
from harness.case import REFERENCE, Case, Inputs, NotApplicable, Program, Provider, Sizes, Suite
from harness.providers import compiled, present

# Name, tokens, classes, features, share of the tokens that count.
PROJECTIONS = (
    ("BERT-base MLM", 16384, 30522, 768, 0.15),
    ("GPT-2", 8192, 50257, 768, 1.0),
    ("Llama 3 8B", 8192, 128256, 4096, 1.0),
)
LOGITS = ((8192, 50257), (32768, 1000))
IGNORED = -100
# Divisors of tokens, and of classes and features.
_SMALLER = {"full": (1, 1), "cpu": (16, 8), "tiny": (256, 64)}


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List the sizes of known models, divided alike where the machine is small."""
    tokens, others = _SMALLER[sizes.name]
    found = [
        _projection(name, n // tokens, c // others, d // others, share, dtype)
        for name, n, c, d, share in PROJECTIONS
    ]
    return found + [_logits(n // tokens, c // others, dtype) for n, c in LOGITS]


def _target(rows: int, classes: int, share: float, device: torch.device) -> Tensor:
    target = torch.randint(classes, (rows,), device=device)
    counted = torch.arange(rows, device=device) * share % 1.0 < share
    return torch.where(counted, target, IGNORED)


def _projection(
    name: str, rows: int, classes: int, features: int, share: float, dtype: torch.dtype
) -> Case:
    counted = int((_target(rows, classes, share, torch.device("cpu")) != IGNORED).sum())

    def make(device: torch.device) -> Inputs:
        weight = torch.randn(classes, features, device=device) / features**0.5
        return {
            "input": torch.randn(rows, features, device=device, dtype=dtype).requires_grad_(),
            "linear_weight": weight.to(dtype).requires_grad_(),
            "target": _target(rows, classes, share, device),
        }

    kept = "" if counted == rows else f", {counted} count"
    return Case(
        "losses",
        f"{name} {rows}x{features} to {classes}{kept}",
        dtype,
        make,
        counting.linear_cross_entropy(rows, counted, classes, features, dtype.itemsize),
        {"projected": True, "dropped": counted < rows},
        headline=True,
    )


def _logits(rows: int, classes: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Inputs:
        return {
            "input": torch.randn(rows, classes, device=device, dtype=dtype).requires_grad_(),
            "target": _target(rows, classes, 1.0, device),
        }

    return Case(
        "losses",
        f"logits {rows}x{classes}",
        dtype,
        make,
        counting.cross_entropy(rows, classes, dtype.itemsize),
        {"projected": False, "dropped": False},
    )


def fused(case: Case) -> Program:
    """Call the library's op."""
    from fusedformer import functional as F

    return Program(F.linear_cross_entropy if case.options["projected"] else F.cross_entropy)


def naive(input: Tensor, target: Tensor, linear_weight: Tensor | None = None) -> Tensor:
    """Call the projection of all rows, if there is one, and torch's loss."""
    logits = input if linear_weight is None else torch_F.linear(input, linear_weight)
    return torch_F.cross_entropy(logits, target)


def eager(case: Case) -> Program:
    """Call torch with all logits in memory."""
    return Program(naive)


def gathered(case: Case) -> Program:
    """Call torch with the rows that count picked out first."""
    if not case.options["dropped"]:
        raise NotApplicable("all rows count")

    def call(input: Tensor, target: Tensor, linear_weight: Tensor) -> Tensor:
        rows = (target != IGNORED).nonzero().squeeze(1)
        return naive(input[rows], target[rows], linear_weight)

    return Program(call)


def chunked(case: Case) -> Program:
    """Call torch's own form in chunks, which it has from 2.13 on."""
    if not case.options["projected"] or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise NotApplicable("it is of projections, and not in every torch")
    options = torch.nn.LinearCrossEntropyOptions()
    return Program(
        lambda input, linear_weight, target: torch_F.linear_cross_entropy(
            input, linear_weight, target, options=options
        )
    )


def liger(case: Case) -> Program:
    """Call liger_kernel's loss, and its projection with the loss; both return float32."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss

    if not case.options["projected"]:
        loss = LigerCrossEntropyLoss()
        # It writes the gradient over the logits.
        return Program(lambda input, target: loss(input.clone(), target).to(input.dtype))
    projected = LigerFusedLinearCrossEntropyLoss()
    return Program(
        lambda input, linear_weight, target: projected(linear_weight, input, target).to(input.dtype)
    )


def truth(case: Case, device: torch.device) -> Program:
    """Compute the definition in float64 by torch's function: that needs less memory."""
    return eager(case)


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    found: dict[str, Any] = {
        "fusedformer": fused,
        REFERENCE: eager,
        "torch eager, rows that count": gathered,
        "torch chunked": chunked,
        "torch.compile": lambda case: compiled(eager(case)),
        "liger_kernel": liger,
    }
    return present(found, device, compile)


SUITE = Suite("losses", cases, providers, truth)


def test_losses(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
