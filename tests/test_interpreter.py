"""The interpreter as the suite uses it computes the same bits as Triton's own."""

from __future__ import annotations

import pytest
import torch
from tests.interpreter import thrifty_interpreter
from torch import Tensor

from fusedformer.parity.cases import Case, all_cases

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.interpreter
CASES = {case.op.name: case for case in all_cases() if case.quick}


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    """Triton's own, in this file."""


def results(case: Case) -> list[Tensor]:
    """Outputs and gradients."""
    made = case.make(torch.Generator().manual_seed(5))
    leaves = [t.requires_grad_() for t in made.values() if t.is_floating_point()]
    torch.manual_seed(6)
    output = case.op.candidate(**made, **case.settings)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    learned = [o for o in outputs if o.requires_grad]
    drawn = [torch.randn_like(o) for o in learned]
    grads = torch.autograd.grad(learned, leaves, drawn, allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name: str) -> None:
    plain = results(CASES[name])
    with thrifty_interpreter():
        thrifty = results(CASES[name])
    assert all(torch.equal(a, b) for a, b in zip(plain, thrifty, strict=True))


@triton.jit
def _refuses():
    tl.static_assert(False, "as it was asked to")


def test_a_launch_that_raises_leaves_nothing_behind() -> None:
    case, language = CASES["layer_norm"], dict(vars(tl))
    want = results(case)
    with thrifty_interpreter():
        with pytest.raises(Exception, match="as it was asked to"):
            _refuses[(1,)]()
        assert vars(tl) == language
        assert all(torch.equal(a, b) for a, b in zip(want, results(case), strict=True))
