"""Contrastive losses of CLIP and SigLIP over all pairs of a batch, with learned scale and bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.providers import compiled, present

DIMS = 512  # of CLIP's base models
BATCHES = {"full": (8192, 16384), "cpu": (512,), "tiny": (64,)}
SCALE, BIAS = 1 / 0.07, -10.0  # where training starts
KINDS = ("softmax", "sigmoid")


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List both losses of each batch."""
    return [_case(kind, rows, dtype) for kind in KINDS for rows in BATCHES[sizes.name]]


def _case(kind: str, rows: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Inputs:
        drawn = torch.randn(2, rows, DIMS, device=device)
        a, b = torch_F.normalize(drawn, dim=-1).to(dtype)
        inputs = {"a": a, "b": b, "logit_scale": torch.tensor(SCALE, device=device)}
        if kind == "sigmoid":
            inputs["logit_bias"] = torch.tensor(BIAS, device=device)
        return {name: value.detach().requires_grad_() for name, value in inputs.items()}

    return Case(
        "contrastive",
        f"{kind} {rows}x{DIMS}",
        dtype,
        make,
        counting.contrastive(rows, DIMS, dtype.itemsize),
        {"kind": kind},
        headline=rows == 8192 or rows < 1024,
    )


def fused(case: Case) -> Program:
    """Call the library's op."""
    from fusedformer import functional as F

    losses = {"softmax": F.contrastive_loss, "sigmoid": F.sigmoid_contrastive_loss}
    return Program(losses[case.options["kind"]], merged=_without_scalars)


def eager(case: Case) -> Program:
    """Call torch with all scores in memory, as training code has it."""

    def softmax(a: Tensor, b: Tensor, logit_scale: Tensor) -> Tensor:
        logits = (logit_scale * (a @ b.T)).to(_wide(a))
        labels = torch.arange(a.shape[0], device=a.device)
        return (torch_F.cross_entropy(logits, labels) + torch_F.cross_entropy(logits.T, labels)) / 2

    def sigmoid(a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        logits = (logit_scale * (a @ b.T) + logit_bias).to(_wide(a))
        signs = 2 * torch.eye(a.shape[0], device=a.device) - 1
        return -torch_F.logsigmoid(signs * logits).sum(1).mean()

    kinds: dict[str, Callable[..., Tensor]] = {"softmax": softmax, "sigmoid": sigmoid}
    return Program(kinds[case.options["kind"]], merged=_without_scalars)


def _without_scalars(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out gradients of one number, which terms cancel to: the tests judge them."""
    return {name: g for name, g in gradients.items() if g.dim()}


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def truth(case: Case, device: torch.device) -> Program:
    """Compute the library's definition."""
    from fusedformer import reference

    losses = {
        "softmax": reference.contrastive_loss, "sigmoid": reference.sigmoid_contrastive_loss
    }  # fmt: skip
    return Program(losses[case.options["kind"]], merged=_without_scalars)


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    found: dict[str, Any] = {
        "fusedformer": fused,
        REFERENCE: eager,
        "torch.compile": lambda case: compiled(eager(case)),
    }
    return present(found, device, compile)


SUITE = Suite("contrastive", cases, providers, truth)


def test_contrastive(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
