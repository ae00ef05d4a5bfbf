"""How attention multiplies float32: by torch's setting, or by three products of TF32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.ops.judge import check, first, grad

import fusedformer
from fusedformer import functional as F
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import recorded_launches

NAME = "scaled_dot_product_attention"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    yield
    matmul.fp32_precision = before
    fusedformer.set_float32_products("torch")


def precisions(device: str, target: str, dim: int, dtype: torch.dtype = torch.float32) -> set[str]:
    """Precisions that the kernels of attention get, forward and backward."""
    query, key, value = (grad(1, 1, 20, dim, device=device).to(dtype) for _ in range(3))
    with (
        targets.assume_target(targets.TARGETS[target]),
        recorded_launches(run=True) as launches,
    ):
        y = F.scaled_dot_product_attention(query, key, value)
        torch.autograd.grad(y, (query, key, value), torch.randn_like(y))
    return {launch.arguments["PRECISION"] for launch in launches if "PRECISION" in launch.arguments}


@pytest.mark.interpreter
def test_three_products_only_where_they_are_asked_for() -> None:
    assert precisions("cpu", "sm_90", 64) == {"ieee"}
    fusedformer.set_float32_products("tf32x3")
    assert precisions("cpu", "sm_90", 64) == {"tf32x3"}
    assert precisions("cpu", "sm_80", 40) == {"tf32x3"}
    assert precisions("cpu", "sm_90", 65) == {"ieee"}, "no registers for larger head dims"
    assert precisions("cpu", "gfx942", 64) == {"ieee"}
    assert precisions("cpu", "sm_90", 64, torch.bfloat16) == {"ieee"}, "that of float32 operands"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert precisions("cpu", "sm_90", 64) == {"tf32"}, "torch allows less"


@pytest.mark.parametrize("dim", [24, 64])
def test_three_products_meet_the_criterion(dim: int, device: str) -> None:
    fusedformer.set_float32_products("tf32x3")
    inputs: dict[str, Any] = {
        n: grad(1, 2, 37, dim, device=device) for n in ("query", "key", "value")
    }
    check(NAME, torch.float32, is_causal=True, return_lse=True, **inputs)
    mask = grad(37, 37, device=device)
    check(NAME, torch.float32, only=first, attn_mask=mask, **inputs)


def test_a_precision_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"set_float32_products\(\): name .* but got 'high'"):
        fusedformer.set_float32_products("high")  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [72, 136])
def test_tf32_with_dropout_beside_a_mask(dim: int, device: str) -> None:
    """In tiles of 16 rows, whose products once had each row twice."""
    leaves = [torch.randn(1, 1, 40, dim, device=device).requires_grad_() for _ in range(3)]
    mask = torch.rand(40, device=device) < 0.7

    def gradients() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        output = F.scaled_dot_product_attention(*leaves, attn_mask=mask, dropout_p=0.3)
        return torch.autograd.grad(output, leaves, leaves[0].detach())

    exact = gradients()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for one, other in zip(gradients(), exact, strict=True):
        assert (one - other).abs().max() <= torch.finfo(torch.bfloat16).eps * other.abs().max()
