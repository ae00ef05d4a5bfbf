"""torch.compile: no graph break, eager's bits, and no more recompilations than shapes demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend
from fusedformer.parity.cases import Case, all_cases

# Packing.of asks the device how many tokens there are: a graph break, tested below.
CASES = [case for case in all_cases() if case.quick and case.op.name not in ("pack", "unpack")]
N, S, D, H = 3, 9, 16, 2


def inputs_of(case: Case, device: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments of a case, and those with a gradient."""
    made = case.make(torch.Generator().manual_seed(5))
    tensors = {name: tensor.to(device) for name, tensor in made.items()}
    leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
    return {**tensors, **case.settings}, leaves


def results(call: Callable[[], Any], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, of random output gradients."""
    output = call()
    outputs = [output] if isinstance(output, Tensor) else list(output)
    learned = [o for o in outputs if o.requires_grad]
    generator = torch.Generator(learned[0].device).manual_seed(9)
    grads = [torch.randn(o.shape, generator=generator, device=o.device) for o in learned]
    found = torch.autograd.grad(learned, leaves, grads, allow_unused=True)
    return [*outputs, *(g for g in found if g is not None)]


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op.name} {case.name}")
def test_every_op(case: Case, dynamic: bool, name: Any, device: str) -> None:
    torch._dynamo.reset()
    given, leaves = inputs_of(case, device)
    compiled = torch.compile(
        case.op.candidate, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    with backend(name):
        eager = results(lambda: case.op.candidate(**given), leaves)
        traced = results(lambda: compiled(**given), leaves)
    assert len(eager) == len(traced)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
