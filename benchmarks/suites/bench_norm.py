"""LayerNorm and RMSNorm: plain, and with the residual (and dropout) that an encoder adds first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.check import check_kept_share
from harness.providers import (
    apex_layer_norm,
    compiled,
    liger,
    present,
    transformer_engine_norm,
)

HIDDEN = (768, 1024, 4096, 8192)
HEADLINE = (768, 4096)
EPS = 1e-5
P = 0.1
# kind: (residual, returns the sum too, dropout)
KINDS = {
    "layer_norm": (False, False, 0.0),
    "rms_norm": (False, False, 0.0),
    "add + layer_norm": (True, False, 0.0),  # post-norm
    "add + layer_norm, sum": (True, True, 0.0),  # pre-norm: the sum goes on to the next block
    "dropout + add + layer_norm": (True, False, P),
}


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List ``sizes.tokens`` rows of each hidden size; dropout at two of them."""
    return [
        _case(kind, sizes.tokens, hidden, dtype)
        for hidden in (HIDDEN[:1] if sizes.name == "tiny" else HIDDEN)
        for kind, (_, _, p) in KINDS.items()
        if not p or hidden in HEADLINE
    ]


def _case(kind: str, rows: int, hidden: int, dtype: torch.dtype) -> Case:
    residual, returns_sum, p = KINDS[kind]

    def make(device: torch.device) -> Inputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

        inputs = {"input": draw(rows, hidden), "weight": draw(hidden)}
        if kind != "rms_norm":
            inputs["bias"] = draw(hidden)
        if residual:
            inputs["residual"] = draw(rows, hidden)
        return inputs

    costs = counting.layer_norm(
        rows,
        hidden,
        dtype.itemsize,
        offset=kind != "rms_norm",
        residual=residual,
        return_sum=returns_sum,
        dropout=p > 0,
    )
    return Case(
        "norm",
        f"{kind} {rows}x{hidden}",
        dtype,
        make,
        costs,
        {"kind": kind, "hidden": hidden, "p": p},
        headline=hidden in HEADLINE and (residual or kind == "layer_norm"),
        before=_check_dropout if p else None,
    )


def fused(case: Case) -> Program:
    """Call the library's op; residual, dropout and norm are one kernel."""
    from fusedformer import functional as F

    kind, shape = case.options["kind"], (case.options["hidden"],)
    if kind == "layer_norm":
        return Program(lambda input, weight, bias: F.layer_norm(input, shape, weight, bias, EPS))
    if kind == "rms_norm":
        return Program(lambda input, weight: F.rms_norm(input, shape, weight, EPS))
    returns_sum: Any
    _, returns_sum, p = KINDS[kind]

    def add_norm(p: float) -> Any:
        return lambda input, residual, weight, bias: F.dropout_add_layer_norm(
            input, residual, shape, weight, bias, EPS, p=p, return_sum=returns_sum
        )

    return Program(add_norm(p), checked=add_norm(0.0))


def eager(case: Case) -> Program:
    """Call torch step by step."""
    kind, shape = case.options["kind"], (case.options["hidden"],)
    if kind == "layer_norm":
        return Program(
            lambda input, weight, bias: torch_F.layer_norm(input, shape, weight, bias, EPS)
        )
    if kind == "rms_norm":
        return Program(lambda input, weight: torch_F.rms_norm(input, shape, weight, EPS))
    returns_sum: Any
    _, returns_sum, p = KINDS[kind]

    def add_norm(p: float) -> Any:
        def call(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
            total = torch_F.dropout(input, p) + residual if p else input + residual
            norm = torch_F.layer_norm(total, shape, weight, bias, EPS)
            return (norm, total) if returns_sum else norm

        return call

    return Program(add_norm(p), checked=add_norm(0.0))


def truth(case: Case, device: torch.device) -> Program:
    """Compute the library's definition, without dropout."""
    from fusedformer import reference

    kind, shape = case.options["kind"], (case.options["hidden"],)
    if kind == "layer_norm":
        return Program(
            lambda input, weight, bias: reference.layer_norm(input, shape, weight, bias, EPS)
        )
    if kind == "rms_norm":
        return Program(lambda input, weight: reference.rms_norm(input, shape, weight, EPS))

    def add_norm(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        both = reference.dropout_add_layer_norm(input, residual, shape, weight, bias, EPS)
        return both if KINDS[kind][1] else both[0]

    return Program(add_norm)


def _check_dropout(program: Program, inputs: Inputs) -> None:
    """Check on ones that the output and the gradient show one mask of the asked share."""
    ones = torch.ones_like(inputs["input"]).requires_grad_()
    gain = torch.ones_like(inputs["weight"])
    zeros, offset = torch.zeros_like(inputs["residual"]), torch.zeros_like(inputs["bias"])
    output = program.function(input=ones, residual=zeros, weight=gain, bias=offset)
    kept = output.detach() > 0
    check_kept_share(kept.double().mean().item(), kept.numel(), P)
    (gradient,) = torch.autograd.grad(output, [ones], torch.randn_like(output))
    if (gradient[~kept] != 0).any():
        raise AssertionError("an element that the forward dropped has a gradient")


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    found: dict[str, Any] = {
        "fusedformer": fused,
        REFERENCE: eager,
        "torch.compile": lambda case: compiled(eager(case)),
        "liger_kernel": liger("norm"),
        "apex": apex_layer_norm,
        "transformer_engine": transformer_engine_norm,
    }
    return present(found, device, compile)


SUITE = Suite("norm", cases, providers, truth)


def test_norm(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
