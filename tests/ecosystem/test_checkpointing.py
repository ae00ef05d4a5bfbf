"""Activation checkpointing draws the same dropout again, and policies see our ops by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fusedformer import backend, nn

D, H = 16, 2


def gradients(layer: torch.nn.Module, x: Tensor, **how: Any) -> list[Tensor]:
    """Output and gradients; with dropout, whose seeds come of torch's generator."""
    leaves = [x, *layer.parameters()]
    torch.manual_seed(4)
    output = checkpoint(layer, x, **how) if how else layer(x)
    grads = torch.autograd.grad(output, leaves, torch.ones_like(x).cumsum(0) * 0.1)
    return [output, *grads]


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_is_drawn_again(use_reentrant: bool, name: Any, device: str) -> None:
    layer = nn.TransformerEncoderLayer(D, H, 24, 0.3, batch_first=True).to(device)
    x = torch.randn(2, 5, D, device=device, requires_grad=True)
    if use_reentrant:  # torch.autograd.grad is not for it
        leaves = [x, *layer.parameters()]
        with backend(name):
            want = gradients(layer, x)
            torch.manual_seed(4)
            output = checkpoint(layer, x, use_reentrant=True)
            output.backward(torch.ones_like(x).cumsum(0) * 0.1)
        got = [output, *(leaf.grad for leaf in leaves)]
    else:
        with backend(name):
            want, got = gradients(layer, x), gradients(layer, x, use_reentrant=False)
    # The first forward of a reentrant checkpoint has no gradients: on a CPU its norms are C++'s.
    limit = None if use_reentrant and name == "torch" else 0.0
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, atol=limit, rtol=limit)


def test_a_policy_keeps_attention_and_computes_the_rest_again(device: str) -> None:
    asked: set[str] = set()
    attention = torch.ops.fusedformer.self_attention.default

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        asked.add(str(op))
        keep = op is attention
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.MUST_RECOMPUTE

    layer = nn.TransformerEncoderLayer(D, H, 24, 0.3, batch_first=True).to(device)
    x = torch.randn(2, 5, D, device=device, requires_grad=True)
    context_fn = partial(create_selective_checkpoint_contexts, policy)
    with backend("triton"):
        want = gradients(layer, x)
        got = gradients(layer, x, use_reentrant=False, context_fn=context_fn)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert {"fusedformer.norm.default", "fusedformer.bias_activation.default"} <= asked
